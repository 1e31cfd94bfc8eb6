"""The README.md of an exported model: written from the files of its run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, report

QUESTION = "What is 12 + 7?"  # that the card asks
GEMMA_NOTICE = (
    "Made from Gemma by fine-tuning. Gemma is provided under and subject to the Gemma Terms of Use "
    "found at ai.google.dev/gemma/terms."
)


@dataclass(frozen=True)
class Use:
    """How the model is used, as the card shows it.

    Attributes:
        question: the user's turn, with the instruction that the run put before each.
        max_new_tokens: of a completion, the run's own limit.
        adapters: whether the folder holds the adapters alone, for PEFT.
    """

    question: str = QUESTION
    max_new_tokens: int = 256
    adapters: bool = False


def model_card(
    run_dir: Path,
    stage: str,
    *,
    base: str,
    of_gemma: bool,
    hub_name: str = "",
    use: Use = Use(),
) -> str:
    """The card of one stage's model, or of its adapters alone.

    Args:
        run_dir: the run; its config.yaml, evaluations/ and summary.json are read.
        stage: whose model it is; one that was cut short by `run_dir.partial_name`.
        base: the base model's name.
        of_gemma: whether the base is Google's, so that the Gemma terms go with it.
        hub_name: the base's name at Hugging Face, if that is known.
        use: how it is asked.

    Raises:
        UserError: the run has no config.yaml.
    """
    base, summary = hub_name or base, _summary(run_dir)
    license_lines = ["license: gemma"] if of_gemma else ["license: apache-2.0"]
    terms = [GEMMA_NOTICE, ""] if of_gemma else []
    return "\n".join(
        [
            "---",
            *license_lines,
            f"library_name: {'peft' if use.adapters else 'transformers'}",
            *([f"base_model: {hub_name}"] if hub_name else []),
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {base}, trained to show its work",
            "",
            f"{'Adapters of stage' if use.adapters else 'Stage'} `{stage}` of a gemma_grpo run "
            f"from `{base}`.",
            *([f"It was cut short: {cut}."] if (cut := unfinished(run_dir, stage)) else []),
            *_format(summary["stages"].get(stage)),
            "",
            *terms,
            "## Measured",
            "",
            *_results(summary),
            "",
            "## Use",
            "",
            *(_use_of_adapters(use, base, hub_name) if use.adapters else _use_of_model(use)),
            "",
            "## How it was trained",
            "",
            "The run's full configuration:",
            "",
            "```yaml",
            _read(run_dir / "config.yaml").rstrip(),
            "```",
            "",
        ]
    )


def unfinished(run_dir: Path, stage: str) -> str | None:
    """That a stage was cut short, and where, by its name and the run's summary; None of others."""
    name, _, step = stage.partition("-step-")
    if not step.isdecimal():
        return None
    stopped = (files.read_json(run_dir / "summary.json") or {}).get("unfinished")
    of = ""
    if isinstance(stopped, dict) and stopped.get("stage") == name:
        of = f" of {stopped.get('num_steps')}"
    return f"stage {name}, step {int(step)}{of}, is not finished"


def _format(result: Any) -> list[str]:
    """What the model answers with, unless none of its measured completions was in the format."""
    if isinstance(result, dict) and result.get("format_rate") == 0:
        return []
    return [
        "It answers a user's turn with",
        "`<reasoning>…</reasoning><answer>…</answer>`.",
    ]


def _use_of_model(use: Use) -> list[str]:
    return [
        "The question goes into a user turn; the chat template is in the folder.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
        f'turns = [{{"role": "user", "content": {_quoted(use.question)}}}]',
        "inputs = tokenizer.apply_chat_template(",
        '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        *_print(use),
        "```",
    ]


def _use_of_adapters(use: Use, base: str, hub_name: str) -> list[str]:
    where = f'"{hub_name}"' if hub_name else '"BASE"'
    note = f"`BASE` is the Hugging Face folder of `{base}`, which the adapters were trained over. "
    turns = f"<start_of_turn>user\n{use.question}<end_of_turn>\n<start_of_turn>model\n"
    return [
        f"{'' if hub_name else note}The question goes into a user turn.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        f"base = AutoModelForCausalLM.from_pretrained({where})",
        'model = PeftModel.from_pretrained(base, "FOLDER")',
        f"turns = {_quoted(turns)}",
        'inputs = tokenizer(turns, return_tensors="pt")',
        *_print(use),
        "```",
    ]


def _print(use: Use) -> list[str]:
    return [
        f"output = model.generate(**inputs, max_new_tokens={use.max_new_tokens})",
        "print(tokenizer.decode(output[0]))",
    ]


def _quoted(text: str) -> str:
    """As a literal of Python, on one line."""
    return json.dumps(text, ensure_ascii=False)


def _summary(run_dir: Path) -> dict[str, Any]:
    """The run's summary or, of an unfinished run, the "stages" that were measured."""
    summary = files.read_json(run_dir / "summary.json") or {}
    if not isinstance(summary.get("stages"), dict):
        paths = sorted((run_dir / "evaluations").glob("*.json"), key=lambda p: p.stat().st_mtime)
        found = {path.stem: files.read_json(path) for path in paths}
        summary = {"stages": {name: result for name, result in found.items() if result}}
    return summary


def _results(summary: dict[str, Any]) -> list[str]:
    """The before/after table."""
    if not any(isinstance(stage, dict) for stage in summary["stages"].values()):
        return ["Nothing was measured in this run."]
    lines = ["Greedy completions of held-out problems, strict parser:", "", "```text"]
    lines += [report.before_after_table(summary), "```"]
    if "device" in summary and isinstance(summary.get("versions"), dict):
        versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
        lines += ["", f"On {summary['device']}, {versions}, seed {summary.get('seed')}."]
    return lines


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error

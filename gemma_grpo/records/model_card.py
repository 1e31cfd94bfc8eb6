"""The README.md of an exported model: written from the files of its run."""

from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, report

GEMMA_NOTICE = (
    "Made from Gemma by fine-tuning. Gemma is provided under and subject to the Gemma Terms of Use "
    "found at ai.google.dev/gemma/terms."
)


_USE_OF_MODEL = (
    "The question goes into a user turn; the chat template is in the folder.",
    "",
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    'turns = [{"role": "user", "content": "What is 12 + 7?"}]',
    "inputs = tokenizer.apply_chat_template(",
    '    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True',
    ")",
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))",
    "```",
)


def model_card(
    run_dir: Path,
    stage: str,
    *,
    base: str,
    of_gemma: bool,
    adapters: bool = False,
    hub_name: str = "",
) -> str:
    """The card of one stage's model, or of its adapters alone.

    Args:
        run_dir: the run; its config.yaml, evaluations/ and summary.json are read.
        stage: whose model it is.
        base: the base model's name.
        of_gemma: whether the base is Google's, so that the Gemma terms go with it.
        adapters: whether the folder holds the adapters alone, for PEFT.
        hub_name: the base's name at Hugging Face, if that is known.

    Raises:
        UserError: the run has no config.yaml.
    """
    base = hub_name or base
    license_lines = ["license: gemma"] if of_gemma else ["license: apache-2.0"]
    terms = [GEMMA_NOTICE, ""] if of_gemma else []
    return "\n".join(
        [
            "---",
            *license_lines,
            f"library_name: {'peft' if adapters else 'transformers'}",
            *([f"base_model: {hub_name}"] if hub_name else []),
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {base}, trained to show its work",
            "",
            f"{'Adapters of stage' if adapters else 'Stage'} `{stage}` of a gemma_grpo run from "
            f"`{base}`. It answers a user's turn with",
            "`<reasoning>…</reasoning><answer>…</answer>`.",
            "",
            *terms,
            "## Measured",
            "",
            *_results(run_dir),
            "",
            "## Use",
            "",
            *(_use_of_adapters(base, hub_name) if adapters else _USE_OF_MODEL),
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


def _use_of_adapters(base: str, hub_name: str) -> list[str]:
    where = f'"{hub_name}"' if hub_name else '"BASE"'
    note = f"`BASE` is the Hugging Face folder of `{base}`, which the adapters were trained over. "
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
        r'turns = "<start_of_turn>user\nWhat is 12 + 7?<end_of_turn>\n<start_of_turn>model\n"',
        'inputs = tokenizer(turns, return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))",
        "```",
    ]


def _results(run_dir: Path) -> list[str]:
    """The before/after table, from the summary or, of an unfinished run, from what was measured."""
    summary = files.read_json(run_dir / "summary.json") or {}
    if not isinstance(summary.get("stages"), dict):
        paths = sorted((run_dir / "evaluations").glob("*.json"), key=lambda p: p.stat().st_mtime)
        found = {path.stem: files.read_json(path) for path in paths}
        summary = {"stages": {name: result for name, result in found.items() if result}}
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

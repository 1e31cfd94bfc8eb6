"""The README.md of an exported model: written from the files of its run."""

from pathlib import Path

from gemma_grpo.errors import UserError
from gemma_grpo.records import files, report

GEMMA_NOTICE = (
    "Made from Gemma by fine-tuning. Gemma is provided under and subject to the Gemma Terms of Use "
    "found at ai.google.dev/gemma/terms."
)


def model_card(run_dir: Path, stage: str, *, base: str, of_gemma: bool) -> str:
    """The card of one stage's model.

    Args:
        run_dir: the run; its config.yaml, evaluations/ and summary.json are read.
        stage: whose model it is.
        base: the base model's name.
        of_gemma: whether the base is Google's, so that the Gemma terms go with it.

    Raises:
        UserError: the run has no config.yaml.
    """
    license_lines = ["license: gemma"] if of_gemma else ["license: apache-2.0"]
    terms = [GEMMA_NOTICE, ""] if of_gemma else []
    return "\n".join(
        [
            "---",
            *license_lines,
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "---",
            "",
            f"# {base}, trained to show its work",
            "",
            f"Stage `{stage}` of a gemma_grpo run from `{base}`. It answers a user's turn with",
            "`<reasoning>…</reasoning><answer>…</answer>`.",
            "",
            *terms,
            "## Measured",
            "",
            *_results(run_dir),
            "",
            "## Use",
            "",
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

"""GSM8K's problems in our format, from local files or the hub.

Source: Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems" (arXiv:2110.14168). A
row has a `question` and an `answer`: a worked solution with calculator marks in double angle
brackets and a last line "#### N".

Choices of ours, not of the paper:
1. Validation is carved from the official training problems by a hash of the question: about one in
   fifteen, the same ones for every seed and order. Training never sees them, whether they are used
   or not.
2. Difficulty is the number of calculator marks: up to 2 easy, 3 or 4 medium, from 5 hard.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from gemma_grpo.data import jsonl, splits, tables
from gemma_grpo.data.problem import Problem
from gemma_grpo.errors import UserError, expanded

HUB_NAME = "openai/gsm8k"
HUB_CONFIG = "main"
VALIDATION_SHARE = 1 / 15  # 482 of the 7473 official training problems
MAX_EASY_MARKS = 2
MAX_MEDIUM_MARKS = 4

Split = Literal["train", "validation", "test"]

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def gsm8k_problems(path: str | Path | None, split: Split) -> list[Problem]:
    """All problems of one split, in file order.

    Args:
        path: a JSONL, CSV or parquet file, or a folder with train and test files (`train.jsonl`,
            Kaggle's `main_train.csv`, the hub's `main/train-00000-of-00001.parquet`, or one file
            with the split's name in its own); None fetches the data set from the hub.
        split: "test" is the official test split; "train" and "validation" divide the official
            training problems.

    Raises:
        UserError: no such file or split, several files that might be meant, a malformed row, or no
            network.
    """
    stored = "test" if split == "test" else "train"
    rows = _hub_rows(stored) if path is None else _local_rows(expanded(path), stored)
    problems = [problem_from_row(row, where) for where, row in rows]
    if split == "test":
        return problems
    return splits.one_side(
        problems,
        held_out=split == "validation",
        share=VALIDATION_SHARE,
        origin=f"GSM8K from {path or 'the hub'}",
    )


def problem_from_row(row: Mapping[str, Any], where: str) -> Problem:
    """One GSM8K row as a problem: marks removed, a step a line, commas out of the answer.

    Raises:
        UserError: `question` or `answer` is missing or not text, or the answer has no "#### N" end.
    """
    prompt = jsonl.required_text(row, "question", where)
    reasoning, mark, final = jsonl.required_text(row, "answer", where).rpartition("####")
    answer = final.strip().replace(",", "")
    if not mark or not answer or "\n" in answer:
        raise UserError(
            f'{where}: field "answer" must end in a line "#### N" with the final answer'
        )
    num_marks = len(_CALCULATOR_MARK.findall(reasoning))
    return Problem(
        prompt=prompt,
        answer=answer,
        completion=_worked(_CALCULATOR_MARK.sub("", reasoning), answer),
        difficulty=_difficulty(num_marks),
        domain="gsm8k",
    )


def _worked(reasoning: str, answer: str) -> str | None:
    steps = [step for line in reasoning.splitlines() if (step := line.strip())]
    if not steps:  # an answer alone shows no work, so there is nothing to imitate
        return None
    return "\n".join(["<reasoning>", *steps, "</reasoning>", "<answer>", answer, "</answer>"])


def _difficulty(num_marks: int) -> str:
    if num_marks <= MAX_EASY_MARKS:
        return "easy"
    return "medium" if num_marks <= MAX_MEDIUM_MARKS else "hard"


def _hub_rows(split: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        return tables.download(HUB_NAME, HUB_CONFIG, split)
    except UserError as error:
        raise UserError(f"{error}, as gsm8k:PATH") from error


def _local_rows(path: Path, split: str) -> list[tuple[str, dict[str, Any]]]:
    return [row for file in _files(path, split) for row in tables.read_rows(file)]


def _files(path: Path, split: str) -> list[Path]:
    """The file or shards that hold the split; a file named for neither split is a train file."""
    if path.is_dir():
        return _files_in(path, split) or _files_in(path / "main", split) or _no_split(path, split)
    if not path.is_file():
        raise UserError(f"no such file or folder: {path}")
    is_test = _is_named(path, "test") and not _is_named(path, "train")
    return [path] if is_test == (split == "test") else _no_split(path, split)


def _files_in(folder: Path, split: str) -> list[Path]:
    named = [
        file
        for file in sorted(folder.glob("*"))
        if file.suffix in tables.SUFFIXES and file.is_file() and _is_named(file, split)
    ]
    for exact in (split, f"main_{split}"):  # whatever socratic_train.csv may lie beside it
        if files := [file for file in named if file.stem == exact]:
            return files[:1]
    shards = [_SHARD.search(file.stem) for file in named]
    if len(named) > 1 and (not all(shards) or len({_SHARD.sub("", f.stem) for f in named}) > 1):
        names = ", ".join(file.name for file in named)
        raise UserError(f"{folder} holds several {split} files ({names}): name the one to read")
    if shards and shards[0] and len(named) != int(shards[0][2]):
        raise UserError(f"{folder} holds {len(named)} of {int(shards[0][2])} {split} shards")
    return named


def _is_named(file: Path, split: str) -> bool:
    # A word of its own: "contest" and "constraint" are no splits.
    return re.search(rf"(?<![a-z]){split}(?![a-z])", file.stem.lower()) is not None


def _no_split(path: Path, split: str) -> list[Path]:
    raise UserError(
        f"{path} holds no GSM8K {split} split (looked for {split} in the names of .jsonl, .csv "
        f"and .parquet files): add {split}.jsonl"
        + (
            f", or hold out training problems with gsm8k-validation:{path}"
            if split == "test"
            else ""
        )
    )

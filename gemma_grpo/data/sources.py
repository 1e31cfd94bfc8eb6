"""Problems by the name of their source: the entry point to all data.

    curriculum                 the built-in task, drawn from the seed
    gsm8k, gsm8k:PATH          GSM8K from the hub, or a file or folder; tested on its test split.
                               PATH may be kagglehub:OWNER/DATASET, a data set at Kaggle
    gsm8k-validation[:PATH]    the same training problems; tested on those carved from training
    reasoning_gym:TASK         a task of the reasoning-gym package
    FILE.jsonl                 one file (.csv and .parquet too); about a tenth of its prompts is
                               held out for the test. A file that is only measured on is taken whole
    TRAIN.jsonl,TEST.jsonl     two files (.csv and .parquet too)

Training and test problems of a source never share a prompt, except GSM8K's official splits, which
are taken as published. Which problems are held out never depends on the seed.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from gemma_grpo.data import curriculum, gsm8k, jsonl, kaggle, reasoning_gym, splits, tables
from gemma_grpo.data.problem import DIFFICULTIES, Problem
from gemma_grpo.errors import UserError, expanded, one_line

HELD_OUT_SHARE = 0.1  # of a single file's prompts, by hash; at least one problem on each side

SESSION = "session"  # the source of problems that came from Python, not from a name

MOST_GENERATED = 100_000  # seconds of drawing, and as many different ones are there

NUM_GENERATED = 400  # problems to measure on of a source that has no end
_ENDLESS = ("curriculum", "reasoning_gym")

_NO_FILES = (*_ENDLESS, "gsm8k", "gsm8k-validation", SESSION)

_KNOWN = (
    "curriculum, gsm8k, gsm8k:PATH, gsm8k-validation, gsm8k-validation:PATH, reasoning_gym:TASK, "
    "FILE.jsonl, FILE.csv, FILE.parquet or TRAIN.jsonl,TEST.jsonl"
)


def of_session(
    problems: Sequence[Problem], held_out: Sequence[Problem] | None, split: Literal["train", "test"]
) -> list[Problem]:
    """One side of problems that came from Python: of both, or of `problems` by `splits.one_side`.

    Raises:
        UserError: the sides share a prompt, or there are too few to hold one out.
    """
    if held_out is None:
        return splits.one_side(
            list(problems), held_out=split == "test", share=HELD_OUT_SHARE, origin="problems"
        )
    if shared := splits.shared_prompts(problems, held_out):
        raise UserError(
            f'held_out shares {len(shared)} prompts with problems ("{shared[0][:60]}"): take them '
            "out of one, or the test would reward remembering"
        )
    return list(problems if split == "train" else held_out)


def load(
    source: str,
    *,
    split: Literal["train", "test"],
    num: int,
    seed: int,
    difficulties: tuple[str, ...] = DIFFICULTIES,
) -> list[Problem]:
    """The problems of one side of a source; never empty.

    Args:
        source: one of the forms in this module's docstring.
        num: at most how many. 0 means all; a source that is generated has no end and wants a
            number, and then gives exactly this many.
        seed: what is generated, or which `num` of a stored source are picked (their order stays).
        difficulties: no problems of others are taken.

    Raises:
        UserError: an unknown source, a negative number, or what the source itself refuses.
    """
    if source == SESSION:
        raise UserError(
            "the problems were objects of a Python session: go on from Python, with "
            "gemma_grpo.resume(RUN, problems=...)"
        )
    if num < 0:
        raise UserError(f"cannot load {num} problems: give 0 for all, or how many")
    kind, _, detail = source.partition(":")
    if source == "curriculum":
        return curriculum.problems(split, _finite(num, source), seed, difficulties)
    if kind == "reasoning_gym":
        num = _finite(num, source)
        made = reasoning_gym.reasoning_gym_problems(detail, split=split, num=num, seed=seed)
        return splits.of_difficulties(made, difficulties, source)
    stored = splits.of_difficulties(_stored(source, split), difficulties, source)
    return splits.pick(stored, num, seed)


def to_measure(
    source: str,
    *,
    num: int | None = None,
    difficulties: tuple[str, ...] = DIFFICULTIES,
    trained_on: str = "",
    load_train: Callable[[], Sequence[Problem]] = list,
) -> list[Problem]:
    """What a model is measured on: one file is taken whole, unless the model was trained on it;
    else the test side of a source. A line on stderr says if a file shares training problems.

    Args:
        source, difficulties, and errors: as for `load`.
        num: as for `load`; None takes all, and `NUM_GENERATED` of a source that has no end.
        trained_on: the source that the model was trained on; "" for none.
        load_train: what was trained on; a UserError, where it is gone, is passed over.
    """
    if num is None:
        num = NUM_GENERATED if source.partition(":")[0] in _ENDLESS else 0
    of_files = source.endswith(tables.SUFFIXES)
    is_own = source == trained_on or (
        of_files
        and bool(trained_on)
        and expanded(source).resolve() == expanded(trained_on).resolve()
    )
    if of_files and _is_file(source) and not is_own and num >= 0:
        stored = splits.of_difficulties(_read(source), difficulties, source)
        problems = splits.pick(stored, num, seed=0)
    else:
        problems = load(source, split="test", num=num, seed=0, difficulties=difficulties)
    if is_own or not of_files:
        return problems
    with contextlib.suppress(UserError):
        if shared := splits.shared_prompts(problems, load_train()):
            print(
                f"warning: {source}: {len(shared)} of {len(problems)} problems were trained on "
                f'("{shared[0][:60]}"): their answers may be remembered',
                file=sys.stderr,
            )
    return problems


def fields_not_read(source: str) -> str | None:
    """A line on the fields of a source's own files that no problem takes; None if there are none.
    Raises UserError as `load`."""
    if source.partition(":")[0] in _NO_FILES:
        return None
    found: dict[str, None] = {}
    for file in _files(source):
        for _, row in tables.read_rows(file):
            read = jsonl.FIELDS if row.get("prompt") else (*jsonl.FIELDS, "question")
            found |= dict.fromkeys(name for name in row if name not in read)
    if not found:
        return None
    meant = {name: name.strip().lower() for name in found}
    names = [
        f"{name} (write {meant[name]})" if meant[name] in jsonl.FIELDS else name for name in found
    ]
    return f"{source}: fields not read: {one_line(', '.join(names), 200)}"


def _finite(num: int, source: str) -> int:
    if num == 0:
        raise UserError(f"{source} has no end, so it cannot give all problems: say how many")
    if num > MOST_GENERATED:
        raise UserError(
            f"{source}: {num:,} problems are more than it draws before a run starts: ask for at "
            f"most {MOST_GENERATED:,}"
        )
    return num


def _stored(source: str, split: Literal["train", "test"]) -> list[Problem]:
    kind, colon, path = source.partition(":")
    if kind in ("gsm8k", "gsm8k-validation"):
        if colon and not path:
            raise UserError(f'source "{source}" names no path after the colon')
        if path.startswith(kaggle.PREFIX):
            path = str(kaggle.dataset_folder(path))
        held_out: gsm8k.Split = "test" if kind == "gsm8k" else "validation"
        return gsm8k.gsm8k_problems(path or None, "train" if split == "train" else held_out)
    if source and expanded(source).is_dir():
        raise UserError(
            f"data source {source} is a folder: name a file in it, .jsonl, .csv or .parquet (of a "
            "saved data set, write a split with its to_parquet), or gsm8k:FOLDER"
        )
    files = _files(source)
    if len(files) == 2:
        return _of_pair(files[0], files[1], split)
    return splits.one_side(
        _read(files[0]), held_out=split == "test", share=HELD_OUT_SHARE, origin=source
    )


def _files(source: str) -> list[str]:
    """The one file or the two that a source names. Raises UserError for any other source."""
    files = [source] if _is_file(source) else [file.strip() for file in source.split(",")]
    if wrong := next((file for file in files if file.endswith(".json")), None):
        raise UserError(
            f"data source {wrong}: a .json file is not read: write a JSON object a line, in a file "
            "whose name ends in .jsonl"
        )
    if len(files) > 2 or not all(file.endswith(tables.SUFFIXES) for file in files):
        raise UserError(f'unknown data source "{source}": use {_KNOWN}')
    return files


def _of_pair(train_file: str, test_file: str, split: str) -> list[Problem]:
    train, test = _read(train_file), _read(test_file)
    if shared := splits.shared_prompts(train, test):
        raise UserError(
            f'{test_file} shares {len(shared)} prompts with {train_file} ("{shared[0][:60]}"): '
            f"take them out of one, or the test would reward remembering"
        )
    return train if split == "train" else test


def _read(file: str) -> list[Problem]:
    return [jsonl.problem_from_row(row, where) for where, row in tables.read_rows(file)]


def _is_file(path: str) -> bool:
    return expanded(path).is_file()

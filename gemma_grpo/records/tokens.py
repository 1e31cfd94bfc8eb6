"""The tokens of completions and their log-probs, in an .npz beside the .jsonl of their texts.

A file holds those of all rows, one row's behind another's, in NumPy's own compressed format:

    num_tokens  int32    of each row: where the others are split
    token_ids   uint32   as sampled, the stop token included
    characters  uint16   of the row's text that each token stands for; 0 for a stop token
    logps       float16  the sampler's log-prob of each token, in nats
    gaps        float16  the trainer's log-prob less the sampler's, on the step's first update;
                         absent where nothing was trained

Does not import jax.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np

from gemma_grpo.records import files

Tokens = dict[str, np.ndarray]
DTYPES = {
    "num_tokens": np.int32,
    "token_ids": np.uint32,
    "characters": np.uint16,
    "logps": np.float16,
    "gaps": np.float16,
}


def path_beside(rows: Path) -> Path:
    """Where the tokens of the rows in a .jsonl file are."""
    return rows.with_suffix(".npz")


def write(path: Path, tokens: Tokens, *, durable: bool = True) -> None:
    """Writes the arrays named above, whole or not at all. Raises as `files.atomic_write`."""
    arrays: dict[str, Any] = {name: array.astype(DTYPES[name]) for name, array in tokens.items()}
    with files.atomic_write(path, durable=durable) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read(path: Path) -> list[Tokens] | None:
    """The arrays of each row; None where there is no whole file, as in runs of older versions."""
    try:
        with np.load(io.BytesIO(files.read_bytes(path)), allow_pickle=False) as file:
            names = [name for name in DTYPES if name in file.files or name != "gaps"]
            arrays = {name: file[name] for name in names}
        ends = np.cumsum(arrays.pop("num_tokens"))
    except Exception:  # a flipped bit: of zipfile's, zlib's, NumPy's and tokenize's errors any
        return None
    if any(array.shape != (ends[-1:].sum(),) for array in arrays.values()):
        return None
    split = [np.split(array, ends[:-1]) for array in arrays.values()]
    return [dict(zip(arrays, row, strict=True)) for row in zip(*split, strict=True)]

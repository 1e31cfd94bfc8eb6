"""A checkpoint that is open but not yet read: its tensors under Hugging Face's names.

Every format's reader gives a `Source`; `assemble` turns any of them into parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gemma_grpo.model import Gemma3Config


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        shape: as Hugging Face has it; a projection is [out, in].
        read: the values, read from the disk at each call, in the dtype they are stored in
            (bfloat16 as ml_dtypes has it) or in float32 where they are dequantised.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Source:
    """A checkpoint of one Gemma 3 text model.

    Attributes:
        path: what the user named.
        config: the model's sizes.
        tensors: by the names of transformers' `Gemma3ForCausalLM`, such as
            `model.layers.0.self_attn.q_proj.weight`; norms hold the gain minus one.
        tokenizer: its SentencePiece file, or None where the checkpoint brings none.
        ignored: what else is in the checkpoint and is no part of the text model.
        multimodal: whether the same model at Hugging Face is a `Gemma3ForConditionalGeneration`,
            whose text model is a module `language_model` beside a vision tower.
    """

    path: Path
    config: Gemma3Config
    tensors: Mapping[str, StoredTensor]
    tokenizer: Path | None
    ignored: tuple[str, ...] = ()
    multimodal: bool = False

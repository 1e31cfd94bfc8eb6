"""A SentencePiece model rebuilt from a GGUF file's tokenizer tables.

GGUF keeps the tokens, their scores and their types, but not SentencePiece's file; `Tokenizer` reads
nothing else. Which types the original had is Gemma's: only `<pad>`, `<eos>` and `<bos>` are control
tokens, which no text can spell; GGUF also calls the turn marks and `<unusedN>` control tokens, and
those are user-defined in the original, and never split wherever they stand in a text.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gemma_grpo.errors import UserError
from gemma_grpo.weights.gguf_header import read_header

_MODEL = "tokenizer.ggml.model"
_TOKENS = "tokenizer.ggml.tokens"
_SCORES = "tokenizer.ggml.scores"
_TYPES = "tokenizer.ggml.token_type"
_TABLES = (_TOKENS, _SCORES, _TYPES)
_IDS = {
    "pad": "tokenizer.ggml.padding_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "bos": "tokenizer.ggml.bos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}
_KINDS = range(1, 7)  # of normal, unknown, control, user-defined, unused and byte tokens
_SPACE = "\u2581"


def rebuild(path: Path) -> bytes:
    """What stands in the `tokenizer.model` of which a GGUF file has the tables.

    Raises:
        UserError: the protobuf package is missing; the file is missing or damaged; a table is
            missing, of another kind of tokenizer, holds what its table cannot, or does not fit
            the others.
    """
    fields = read_header(path).fields
    _check(fields, path)
    ids = {name: fields[key] for name, key in _IDS.items()}
    tokens = fields[_TOKENS]
    proto = _import_protobuf()
    kinds = proto.ModelProto.SentencePiece  # its numbers of types are GGUF's too
    controls = {ids["pad"], ids["eos"], ids["bos"]}
    model = proto.ModelProto()
    tables = zip(tokens, fields[_SCORES].tolist(), fields[_TYPES].tolist(), strict=True)
    for token_id, (text, score, kind) in enumerate(tables):
        if token_id == ids["unk"]:
            kind = kinds.UNKNOWN
        elif token_id in controls:
            kind = kinds.CONTROL
        elif kind in (kinds.CONTROL, kinds.USER_DEFINED):
            text, kind = text.replace(" ", _SPACE), kinds.USER_DEFINED
        scored = kind in (kinds.NORMAL, kinds.BYTE)
        piece = model.pieces.add(piece=text, score=score if scored else 0.0)
        if kind != kinds.NORMAL:  # the default, which Google's file leaves out
            piece.type = kind

    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    for name, token_id in ids.items():
        setattr(trainer, f"{name}_id", token_id)
        setattr(trainer, f"{name}_piece", tokens[token_id])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def _check(fields: dict[str, Any], path: Path) -> None:
    """Raises UserError unless the tables are there and fit each other."""
    kind = fields.get(_MODEL)
    if not isinstance(kind, str) or kind != "llama":  # llama.cpp's name for SentencePiece
        raise UserError(f"tokenizer in {path}: {_MODEL} is {kind!r}, not SentencePiece's 'llama'")
    missing = [key for key in (*_TABLES, *_IDS.values()) if key not in fields]
    if missing:
        raise UserError(f"tokenizer in {path}: the metadata lacks {', '.join(missing)}")
    wrong = [key for key in (*_TABLES, *_IDS.values()) if not _is_typed(key, fields[key])]
    if wrong:
        raise UserError(f"tokenizer in {path}: {', '.join(wrong)} of a wrong type; fetch it again")
    lengths = [len(fields[key]) for key in _TABLES]
    if len(set(lengths)) > 1:
        raise UserError(
            f"tokenizer in {path}: {lengths} entries in {', '.join(_TABLES)}; fetch it again"
        )
    unknown = fields[_TYPES][~np.isin(fields[_TYPES], _KINDS)]
    if unknown.size:
        raise UserError(f"tokenizer in {path}: {_TYPES} has {unknown[0]}; fetch it again")
    if not np.isfinite(fields[_SCORES]).all():
        raise UserError(f"tokenizer in {path}: {_SCORES} has NaN or infinity; fetch it again")
    for key in _IDS.values():
        if not 0 <= fields[key] < lengths[0]:
            raise UserError(
                f"tokenizer in {path}: {key} is {fields[key]}, but there are {lengths[0]} tokens"
            )
    if fields.get("tokenizer.ggml.add_space_prefix", False) is not False:
        raise UserError(
            f"tokenizer in {path}: add_space_prefix is not false; Gemma puts no space before text"
        )


def _is_typed(key: str, value: Any) -> bool:
    """Whether a table or an id is of the type that GGUF's specification gives it."""
    if key == _TOKENS:
        return isinstance(value, list)
    if key in (_SCORES, _TYPES):
        kinds = "f" if key == _SCORES else "iu"
        return isinstance(value, np.ndarray) and value.dtype.kind in kinds
    return type(value) is int


def _import_protobuf() -> ModuleType:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            "rebuilding a tokenizer needs protobuf: pip install 'gemma_grpo[gemma3-270m]'"
        ) from error
    return sentencepiece_model_pb2

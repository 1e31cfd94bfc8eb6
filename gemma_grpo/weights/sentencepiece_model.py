"""A SentencePiece model rebuilt from a GGUF file's tokenizer tables. Knows no weights.

GGUF keeps the pieces, their scores and their types, but not SentencePiece's file; `Tokenizer` reads
nothing else. Which types the original had is Gemma's: only `<pad>`, `<eos>` and `<bos>` are control
pieces, which no text can spell; GGUF also calls the turn marks and `<unusedN>` control tokens, and
those are user-defined there, taken whole wherever they stand in a text.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from gemma_grpo.errors import UserError

TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
TYPES = "tokenizer.ggml.token_type"
IDS = {
    name: f"tokenizer.ggml.{key}_token_id"
    for name, key in (("pad", "padding"), ("eos", "eos"), ("bos", "bos"), ("unk", "unknown"))
}

# GGUF's token types (llama.cpp, enum llama_token_type), which are SentencePiece's own.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"


def rebuild(fields: Mapping[str, Any], path: Path) -> bytes:
    """The bytes of a `tokenizer.model`.

    Args:
        fields: a GGUF's metadata.
        path: where it came from, for messages.

    Raises:
        UserError: the sentencepiece or protobuf package is missing; a table is missing, of another
            kind of tokenizer, or of another length than the rest.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind != "llama":  # llama.cpp's name for SentencePiece
        raise UserError(
            f"tokenizer of {path}: {kind!r} tables; only SentencePiece's can be rebuilt"
        )
    missing = [key for key in (TOKENS, SCORES, TYPES, *IDS.values()) if key not in fields]
    if missing:
        raise UserError(f"tokenizer of {path}: the metadata lacks {', '.join(missing)}")
    lengths = {key: len(fields[key]) for key in (TOKENS, SCORES, TYPES)}
    if len(set(lengths.values())) > 1:
        raise UserError(f"tokenizer of {path}: tables of unequal length: {lengths}")
    ids = {name: fields[key] for name, key in IDS.items()}
    tokens = fields[TOKENS]
    if not all(0 <= token_id < len(tokens) for token_id in ids.values()):
        raise UserError(f"tokenizer of {path}: {ids} in a vocabulary of {len(tokens)}")

    model = _import_protobuf().ModelProto()
    controls = {ids["pad"], ids["eos"], ids["bos"]}
    tables = zip(tokens, fields[SCORES].tolist(), fields[TYPES].tolist(), strict=True)
    for token_id, (token, score, gguf_type) in enumerate(tables):
        piece, piece_type = token, gguf_type
        if token_id == ids["unk"]:
            piece_type = UNKNOWN
        elif token_id in controls:
            piece_type = CONTROL
        elif gguf_type in (CONTROL, USER_DEFINED):
            piece, piece_type = token.replace(" ", SPACE), USER_DEFINED
        added = model.pieces.add(piece=piece, score=score if piece_type in (NORMAL, BYTE) else 0.0)
        if piece_type != NORMAL:  # the default, which Google's file leaves out
            added.type = piece_type

    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = trainer.split_digits = trainer.allow_whitespace_only_pieces = True
    for name, token_id in ids.items():
        setattr(trainer, f"{name}_id", token_id)
        setattr(trainer, f"{name}_piece", tokens[token_id])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = fields.get("tokenizer.ggml.add_space_prefix", False)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString()


def _import_protobuf() -> ModuleType:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            "rebuilding a tokenizer needs protobuf: pip install 'gemma_grpo[gemma3-270m]'"
        ) from error
    return sentencepiece_model_pb2

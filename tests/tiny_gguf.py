"""Tiny GGUF files of Gemma 3, written by the gguf package, for the tests of gemma_grpo.weights.

The model has the sizes of gemma3-nano, so that it is a known one; every type of tensor in the real
270M's file is in it. Names come from gguf's own table, quantised blocks are random bytes, and what
they stand for is written out below from ggml's C code.
"""

import struct
from pathlib import Path

import numpy as np
import pytest

from gemma_grpo.model import CONFIGS
from gemma_grpo.weights.assets import NANO_TOKENIZER

gguf = pytest.importorskip("gguf", reason="GGUF files need the extra [gemma3-270m]")
proto = pytest.importorskip(
    "sentencepiece.sentencepiece_model_pb2", reason="SentencePiece models need protobuf"
)
Kind = gguf.GGMLQuantizationType

NANO = CONFIGS["gemma3-nano"]
D, F = NANO.embed_dim, NANO.hidden_dim
QUERIES, KEYS, H = NANO.num_heads * NANO.head_dim, NANO.num_kv_heads * NANO.head_dim, NANO.head_dim

BLOCK = {  # of transformers' Gemma3ForCausalLM: shape, and how this file stores it
    "input_layernorm": ((D,), Kind.F32),
    "self_attn.q_proj": ((QUERIES, D), Kind.Q5_0),
    "self_attn.k_proj": ((KEYS, D), Kind.Q8_0),
    "self_attn.v_proj": ((KEYS, D), Kind.BF16),
    "self_attn.q_norm": ((H,), Kind.F32),
    "self_attn.k_norm": ((H,), Kind.F32),
    "self_attn.o_proj": ((D, QUERIES), Kind.F16),
    "post_attention_layernorm": ((D,), Kind.F32),
    "pre_feedforward_layernorm": ((D,), Kind.F32),
    "mlp.gate_proj": ((F, D), Kind.Q5_0),
    "mlp.up_proj": ((F, D), Kind.F32),
    "mlp.down_proj": ((D, F), Kind.Q6_K),
    "post_feedforward_layernorm": ((D,), Kind.F32),
}
TENSORS = {
    "model.embed_tokens": ((NANO.vocab_size, D), Kind.Q8_0),
    "model.norm": ((D,), Kind.F32),
} | {
    f"model.layers.{layer}.{name}": spec
    for layer in range(NANO.num_layers)
    for name, spec in BLOCK.items()
}
TENSORS["model.layers.5.mlp.down_proj"] = ((D, F), Kind.Q4_K)
THEIR_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, NANO.num_layers)


# --- what the blocks stand for: ggml-quants.c, one block after the other ---


def half(block: bytes, at: int) -> np.float32:
    return np.frombuffer(block, "<f2", 1, at)[0].astype(np.float32)


def q8_0(block: bytes) -> np.ndarray:
    return half(block, 0) * np.frombuffer(block, np.int8, 32, 2).astype(np.float32)


def q5_0(block: bytes) -> np.ndarray:
    """Four low bits in nibbles, the fifth of each in one 32-bit number."""
    (high,) = struct.unpack_from("<I", block, 2)
    low = [byte & 15 for byte in block[6:]] + [byte >> 4 for byte in block[6:]]
    values = [(low[i] | (high >> i & 1) << 4) - 16 for i in range(32)]
    return half(block, 0) * np.array(values, np.float32)


def q4_k(block: bytes) -> np.ndarray:
    """Eight groups of 32 nibbles, each with a scale and a minimum of six bits."""
    d, least, packed, nibbles = half(block, 0), half(block, 2), block[4:16], block[16:]
    out = []
    for group in range(8):
        if group < 4:
            scale, minimum = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            minimum = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        pairs = nibbles[group // 2 * 32 :][:32]
        values = [byte >> 4 if group % 2 else byte & 15 for byte in pairs]
        out += [d * np.float32(scale) * np.float32(v) - least * np.float32(minimum) for v in values]
    return np.array(out, np.float32)


def q6_k(block: bytes) -> np.ndarray:
    """Two halves of 128; four low bits, two high bits and a signed scale for each 16."""
    d, out = half(block, 208), np.zeros(256, np.float32)
    for part in range(2):
        low, high = block[64 * part :][:64], block[128 + 32 * part :][:32]
        scales = np.frombuffer(block, np.int8, 8, 192 + 8 * part)
        for i in range(32):
            fours = (low[i] & 15, low[i + 32] & 15, low[i] >> 4, low[i + 32] >> 4)
            for quarter, four in enumerate(fours):
                value = (four | (high[i] >> 2 * quarter & 3) << 4) - 32
                scale = d * np.float32(scales[i // 16 + 2 * quarter])
                out[128 * part + 32 * quarter + i] = scale * np.float32(value)
    return out


BLOCKS = {  # bytes of a block, where in it half-precision numbers stand, what it stands for
    Kind.Q8_0: (34, (0,), q8_0),
    Kind.Q5_0: (22, (0,), q5_0),
    Kind.Q4_K: (144, (0, 2), q4_k),
    Kind.Q6_K: (210, (208,), q6_k),
}


def draw(rng: np.random.Generator, shape: tuple, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """What is stored of a random tensor, and its values in float32."""
    if kind in BLOCKS:
        size, halves, meaning = BLOCKS[kind]
        per_row = shape[1] // (256 if size > 34 else 32)
        blocks = rng.integers(0, 256, (shape[0] * per_row, size), np.uint8)
        for at in halves:
            scales = rng.normal(0, 0.01, len(blocks)).astype("<f2")
            blocks[:, at : at + 2] = scales[:, None].view(np.uint8)
        values = np.stack([meaning(block.tobytes()) for block in blocks])
        return blocks.reshape(shape[0], -1), values.reshape(shape)
    values = rng.normal(0, 1, shape).astype(np.float32)
    if kind == Kind.F16:
        return values.astype(np.float16), values.astype(np.float16).astype(np.float32)
    if kind == Kind.BF16:
        upper = values.view(np.uint32) & np.uint32(0xFFFF0000)  # cut off, not rounded
        return (upper >> 16).astype(np.uint16).view(np.uint8), upper.view(np.float32)
    return values, values


RNG = np.random.default_rng(0)
DRAWN = {name: draw(RNG, *spec) for name, spec in TENSORS.items()}
METADATA = {
    "block_count": 6,
    "embedding_length": 64,
    "feed_forward_length": 256,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 32,
    "attention.sliding_window": 64,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e6,
}


def tables(model: bytes) -> dict[str, list]:
    """A SentencePiece model's tables as llama.cpp's converter makes them of Gemma's: symbols with
    real spaces and a low score, the turn marks as control tokens."""
    columns = {"tokens": [], "scores": [], "token_type": []}
    for piece in proto.ModelProto.FromString(model).pieces:
        symbol = piece.type == gguf.TokenType.USER_DEFINED
        mark = piece.piece in MARKS
        columns["tokens"].append(piece.piece.replace(SPACE, " ") if symbol else piece.piece)
        columns["scores"].append(-1000.0 if symbol else piece.score)
        columns["token_type"].append(gguf.TokenType.CONTROL if mark else int(piece.type))
    return columns


SPACE, MARKS = "\u2581", ("<start_of_turn>", "<end_of_turn>", "<unused0>")
TOKENIZER = tables(NANO_TOKENIZER.read_bytes()) | {
    "model": "llama",
    "padding_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "unknown_token_id": 3,
    "add_space_prefix": False,
}


def write(
    path: Path,
    *,
    architecture: str = "gemma3",
    metadata: dict = METADATA,
    tokenizer: dict = TOKENIZER,
    changes: dict[str, np.ndarray | None] | None = None,
    alignment: int = 32,
    **options,
) -> Path:
    """The file, by the gguf package. `changes`: float32 tensors by GGUF's names; None drops one."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    fields = {f"{architecture}.{key}": value for key, value in metadata.items()}
    fields |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    fields |= {"general.tags": ["tiny", "ünïcode"], "numbers": [1.5, -2.0]}
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        adders[type(value)](key, value)
    tensors = {
        f"{THEIR_NAMES.get_name(name)}.weight": (stored, TENSORS[name][1])
        for name, (stored, _) in DRAWN.items()
    }
    tensors |= {name: (array, Kind.F32) for name, array in (changes or {}).items()}
    for name, (stored, kind) in tensors.items():
        if stored is not None:
            writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

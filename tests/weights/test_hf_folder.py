"""gemma_grpo.weights.hf_folder and .tensor_file: folders that transformers wrote, intact and
damaged in each way that has an error of its own."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import FOLDERS, all_tensors, copy_of, edit_json, logits_of, save_as_one
from oracles.gemma3_recipe import CASES, draw_weights
from small_models import make_config, make_params
from tolerances import TRANSFORMERS_LOGITS

from gemma_grpo import model as gemma3
from gemma_grpo.errors import UserError
from gemma_grpo.weights import tensor_file
from gemma_grpo.weights.assemble import assemble
from gemma_grpo.weights.hf_folder import open_folder
from gemma_grpo.weights.load import open_source
from gemma_grpo.weights.source import Source

MADE_FROM = {  # as make_hf_folders.py has it
    "text": (CASES["window_one_short_of_13_layers_4_of_2"], jnp.bfloat16),
    "multimodal": (CASES["global_rope_scaled_by_8_window_6_in_29_layers_7_of_3"], jnp.float16),
}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def text(tmp_path) -> Path:
    return copy_of("text", tmp_path / "text")


@pytest.fixture
def multimodal(tmp_path) -> Path:
    return copy_of("multimodal", tmp_path / "multimodal")


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_folder(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# --- complete folders ---


@pytest.mark.parametrize("name", MADE_FROM)
def test_a_folder_of_transformers_gives_the_weights_put_into_it_and_the_logits_it_had(name):
    settings, dtype = MADE_FROM[name]
    source = open_folder(FOLDERS / name)
    assert source.config == make_config(settings) and source.tokenizer is None
    like = gemma3.abstract(source.config)[1]
    params = assemble(source, like, dtype=dtype, sharding=None)
    drawn = jax.tree.map(lambda leaf: leaf.astype(dtype), make_params(settings))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, drawn))
    with np.load(FOLDERS / "logits.npz") as oracle:
        ids_BL, expected = oracle[f"{name}/ids"], oracle[f"{name}/logits"]
    assert np.abs(logits_of(source, ids_BL) - expected).max() <= TRANSFORMERS_LOGITS


def test_the_rest_of_a_multimodal_model_is_named_as_ignored():
    there, source = all_tensors(FOLDERS / "multimodal"), open_folder(FOLDERS / "multimodal")
    rest = {name for name in there if not name.startswith("language_model.")}
    assert set(source.ignored) == rest and len(source.ignored) == len(rest) > 30
    assert {name.split(".")[0] for name in rest} == {"vision_tower", "multi_modal_projector"}
    assert open_folder(FOLDERS / "text").ignored == ()


def test_multimodal_names_of_both_layouts_are_known(multimodal):
    """Since transformers 4.52 the modules are model.language_model, model.vision_tower ..."""
    as_published = open_folder(FOLDERS / "multimodal")
    renamed = {
        "model." + name.replace("language_model.model.", "language_model."): tensor
        for name, tensor in all_tensors(multimodal).items()
    }
    assert f"model.language_model.{EMBEDDING.removeprefix('model.')}" in renamed
    save_as_one(multimodal, renamed)
    source = open_folder(multimodal)
    assert source.tensors.keys() == as_published.tensors.keys()
    assert {f"model.{name}" for name in as_published.ignored} == set(source.ignored)
    for name, tensor in source.tensors.items():
        np.testing.assert_array_equal(tensor.read(), as_published.tensors[name].read())


def test_several_files_need_no_index(text):
    (text / "model.safetensors.index.json").unlink()
    source, whole = open_folder(text), open_folder(FOLDERS / "text")
    assert source.tensors.keys() == whole.tensors.keys()
    np.testing.assert_array_equal(source.tensors[EMBEDDING].read(), whole.tensors[EMBEDDING].read())


def test_a_file_that_the_index_does_not_name_is_left_alone(text):
    safetensors.numpy.save_file({EMBEDDING: np.zeros((2, 2))}, text / "consolidated.safetensors")
    assert open_folder(text).tensors[EMBEDDING].shape == (37, 18)


def saved(path: Path, value: float) -> None:
    """A model of the text folder's shapes, its embedding filled with a value."""
    tensors = all_tensors(FOLDERS / "text")
    tensors[EMBEDDING] = np.full_like(tensors[EMBEDDING], value)
    safetensors.numpy.save_file(tensors, path)


def embedding_of(source: Source) -> float:
    return float(source.tensors[EMBEDDING].read()[0, 0])


def test_a_whole_file_is_read_before_the_index_of_an_older_download_as_transformers_does(text):
    saved(text / "model.safetensors", 7)
    assert embedding_of(open_folder(text)) == 7
    for shard in text.glob("model-*.safetensors"):
        shard.unlink()
    (text / "model.safetensors").rename(text / "gemma.safetensors")
    assert embedding_of(open_folder(text)) == 7  # an index without any of its files says nothing


def test_the_file_that_was_named_is_read_and_of_several_the_model_that_they_are(text):
    before = embedding_of(open_folder(text))
    for name, value in (("model", 7), ("other", 8)):
        saved(text / f"{name}.safetensors", value)
    assert embedding_of(open_source(str(text / "other.safetensors"))) == 8
    assert embedding_of(open_source(str(text / "model-00002-of-00004.safetensors"))) == before


@pytest.mark.parametrize("name", ["model", "adapter_model"])
def test_an_adapter_named_as_weights_is_called_an_adapter(text, name):
    factors = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.zeros((2, 2))}
    file = text / f"{name}.safetensors"
    safetensors.numpy.save_file(factors, file)
    with pytest.raises(UserError, match="a LoRA adapter; merge it into its base model first"):
        open_source(str(file))


@pytest.mark.parametrize("place", [7, None, ["a"], "../other/model.safetensors", "/etc/passwd", ""])
def test_an_index_names_files_of_its_own_folder(text, place):
    edit_json(text / "model.safetensors.index.json", weight_map={EMBEDDING: place, "b": "c"})
    assert "names no file of its folder; fetch it again" in refusal(text)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_is_read_as_the_safetensors_library_reads_it(text, dtype):
    settings, _ = MADE_FROM["text"]
    weights = {name: array.astype(dtype) for name, array in draw_weights(settings).items()}
    save_as_one(text, weights)
    tensors = open_folder(text).tensors
    assert tensors.keys() == weights.keys()
    for name, expected in weights.items():
        found = tensors[name].read()
        assert found.dtype == expected.dtype and tensors[name].shape == expected.shape
        np.testing.assert_array_equal(found, expected)


def test_the_tokenizer_beside_is_found(text):
    (text / "tokenizer.model").touch()
    assert open_folder(text).tokenizer == text / "tokenizer.model"


def test_opening_reads_no_tensor(text):
    before = {file: file.stat().st_size for file in text.glob("*.safetensors")}
    for file, size in before.items():  # the same header over a hole: no byte of a tensor is left
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        os.truncate(file, header)
        os.truncate(file, size)
    source = open_folder(text)
    assert not source.tensors[EMBEDDING].read().any()


# --- the head ---


def test_a_head_that_repeats_the_embedding_is_left_out(text, multimodal):
    tensors = all_tensors(text)
    save_as_one(text, tensors | {"lm_head.weight": tensors[EMBEDDING].copy()})
    assert open_folder(text).tensors.keys() == tensors.keys()
    tensors = all_tensors(multimodal)
    repeated = tensors[f"language_model.{EMBEDDING}"].copy()
    save_as_one(multimodal, tensors | {"language_model.lm_head.weight": repeated})
    assert "lm_head.weight" not in open_folder(multimodal).tensors


@pytest.mark.parametrize("spoil", ["last value", "dtype", "shape", "no embedding"])
def test_a_head_of_its_own_is_refused(text, spoil):
    tensors = all_tensors(text)
    head = tensors[EMBEDDING].copy()
    if spoil == "last value":
        head[-1, -1] += 1
    elif spoil == "dtype":
        head = head.view(np.float16)
    elif spoil == "shape":
        head = head.reshape(18, 37)
    else:
        del tensors[EMBEDDING]
    save_as_one(text, tensors | {"lm_head.weight": head})
    assert f"lm_head.weight differs from {EMBEDDING}; Gemma 3 ties the two" in refusal(text)


def test_a_difference_far_into_a_head_is_seen(text, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK", 64)
    tensors = all_tensors(text)
    head = tensors[EMBEDDING].copy()
    save_as_one(text, tensors | {"lm_head.weight": head.copy()})
    assert "lm_head.weight" not in open_folder(text).tensors
    head[-1, -1] += 1
    save_as_one(text, tensors | {"lm_head.weight": head})
    assert "differs" in refusal(text)


# --- what is refused ---


def test_another_model_is_refused_by_its_type(text):
    edit_json(text / "config.json", model_type="llama")
    assert "model_type 'llama' is not Gemma 3" in refusal(text)
    edit_json(text / "config.json", model_type=None)
    assert "model_type None is not Gemma 3" in refusal(text)


def test_a_setting_that_we_do_not_implement_is_refused_by_name(text):
    edit_json(text / "config.json", final_logit_softcapping=30.0)
    assert "final_logit_softcapping=30.0 is not implemented" in refusal(text)


def test_a_multimodal_config_without_its_text_part_is_refused(multimodal):
    edit_json(multimodal / "config.json", text_config=None)
    assert "without text_config" in refusal(multimodal)


@pytest.mark.parametrize(
    ("quantised", "method"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), ("awq", "awq")],
)
def test_a_quantised_folder_is_refused_by_method(text, multimodal, quantised, method):
    edit_json(text / "config.json", quantization_config=quantised)
    assert f"quantised ({method}); fetch the model in bfloat16, or a .gguf" in refusal(text)
    config = json.loads((multimodal / "config.json").read_text())
    inner = config["text_config"] | {"quantization_config": quantised}
    edit_json(multimodal / "config.json", text_config=inner)
    assert f"quantised ({method})" in refusal(multimodal)


def test_a_tensor_of_integers_is_refused_by_name_unless_it_is_ignored(text, multimodal):
    name = "model.layers.0.mlp.up_proj.weight"
    save_as_one(text, all_tensors(text) | {name: np.zeros((22, 18), np.uint8)})
    assert f"{name} is stored as U8, a quantised model" in refusal(text)
    rest = {"vision_tower.position_ids": np.arange(3)}
    save_as_one(multimodal, all_tensors(multimodal) | rest)
    assert "vision_tower.position_ids" in open_folder(multimodal).ignored


def empty_of_weights(folder: Path) -> Path:
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    return folder


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("pytorch_model.bin", "only pickled PyTorch weights"),
        ("model.pth", "only pickled PyTorch weights"),
        ("adapter_model.safetensors", "only a LoRA adapter; merge it into its base model first"),
        ("gemma.Q8_0.gguf", "no *.safetensors in it; name the file gemma.Q8_0.gguf itself"),
        ("README.md", "no *.safetensors in it; fetch them too"),
    ],
)
def test_a_folder_without_safetensors_is_told_what_it_has_instead(text, there, words):
    (empty_of_weights(text) / there).touch()
    assert words in refusal(text)


def test_an_adapter_beside_the_model_is_left_alone(text):
    adapter = {"base_model.model.lora_A.weight": np.zeros((2, 2))}
    save_as_one(text, all_tensors(text))
    safetensors.numpy.save_file(adapter, text / "adapter_model.safetensors")
    assert not any("lora" in name for name in open_folder(text).tensors)


def test_a_missing_or_damaged_config_is_named(text):
    (text / "config.json").write_text("{")
    assert "config.json: not JSON" in refusal(text)
    (text / "config.json").write_text("[]")
    assert "config.json: not a JSON object" in refusal(text)
    (text / "config.json").unlink()
    assert "no config.json in this folder; fetch it too" in refusal(text)


def test_a_missing_file_of_several_is_named_and_counted(text):
    (text / "model-00002-of-00004.safetensors").unlink()
    (text / "model-00004-of-00004.safetensors").unlink()
    words = "model-00002-of-00004.safetensors is not there (2 of 4 files missing); fetch the rest"
    assert words in refusal(text)


def test_an_index_alone_is_refused_by_the_name_of_what_it_lacks(text):
    """Of a download that was cut short before the weights."""
    names = [file.name for file in text.glob("*.safetensors")]
    for name in names:
        (text / name).unlink()
    with pytest.raises(UserError) as caught:
        open_folder(text)
    assert any(name in str(caught.value) for name in names), caught.value


def test_an_index_that_does_not_fit_its_files_is_refused(text):
    index = text / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    placed[EMBEDDING] = "model-00004-of-00004.safetensors"
    edit_json(index, weight_map=placed)
    assert f"says that {EMBEDDING} is in model-00004-of-00004.safetensors" in refusal(text)
    edit_json(index, weight_map={})
    assert "no weight_map; fetch it again" in refusal(text)


def test_a_tensor_in_two_files_is_refused_by_name_and_files(text):
    (text / "model.safetensors.index.json").unlink()
    tensors = {EMBEDDING: np.zeros((37, 18), np.float32)}
    safetensors.numpy.save_file(tensors, text / "more.safetensors")
    words = f"{EMBEDDING} is both in model-00001-of-00004.safetensors and in more.safetensors"
    assert words in refusal(text)


def test_a_file_cut_short_anywhere_is_refused(text):
    file = text / "model-00003-of-00004.safetensors"
    whole = file.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "fetch it again" in refusal(text) and file.name in refusal(text)
    file.write_bytes(whole + b"more")
    assert f"{len(whole) + 4} bytes, but its header says {len(whole)}" in refusal(text)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"a": 1}',
        '{"a": {"dtype": "F32"}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}',
        "not json",
        "[" * 5000,
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}',
        '{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "I8", "shape": [8], "data_offsets": [8, 0]}}',
        '{"a": {"dtype": "F32", "shape": [true, 2], "data_offsets": [0, 8]}}',
    ],
)
def test_what_is_no_safetensors_header_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match="not a safetensors file; fetch it again"):
        tensor_file.slots(file)


def test_a_file_that_shrinks_after_it_was_opened_is_refused(text):
    source = open_folder(text)
    for file in text.glob("*.safetensors"):
        os.truncate(file, 100)
    with pytest.raises(UserError, match="was cut short while it was read"):
        source.tensors[EMBEDDING].read()


@pytest.mark.parametrize("offsets", [([0, 8], [4, 12]), ([0, 4], [8, 12]), ([4, 8], [8, 12])])
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path, offsets):
    header = json.dumps(
        {
            name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
            for name, (begin, end) in zip("ab", offsets, strict=True)
        }
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(12))
    with pytest.raises(UserError, match="overlaps another tensor, or a gap is before it"):
        tensor_file.slots(file)


@pytest.mark.parametrize("layers", [10**7, 1e300, float("inf"), float("nan")])
def test_more_layers_than_tensors_are_refused_before_anything_is_made_of_them(text, layers):
    edit_json(text / "config.json", num_hidden_layers=layers)
    assert "num_hidden_layers=" in refusal(text) and "tensors" in refusal(text)


def test_a_config_of_deep_brackets_is_one_line(text):
    (text / "config.json").write_text("[" * 100_000)
    assert "not JSON" in refusal(text)


def test_float64_is_called_float64(text):
    name = "model.layers.0.mlp.up_proj.weight"
    save_as_one(text, all_tensors(text) | {name: np.zeros((22, 18), np.float64)})
    assert f"{name} is stored as F64, float64; fetch the one in F32" in refusal(text)

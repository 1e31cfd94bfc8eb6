"""gemma_grpo.weights.load: which reader opens what the user named."""

import shutil
from pathlib import Path

import pytest
from hf_folders import FOLDERS, copy_of

from gemma_grpo.data import kaggle
from gemma_grpo.errors import UserError
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.weights import assets, gemma3_270m
from gemma_grpo.weights.load import open_source, tokenizer_path

ORBAX = Path(__file__).parents[1] / "oracles" / "gemma_flax" / "nested"


def refusal(where: str) -> str:
    with pytest.raises(UserError) as caught:
        open_source(where)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_embedded_model_goes_by_its_name_and_runs_as_its_config_says():
    source = open_source("gemma3-nano")
    assert source.config == CONFIGS["gemma3-nano"] and source.config.scan_unroll == 6
    assert tokenizer_path(source) == assets.NANO / "tokenizer.model"


def test_the_packaged_model_goes_by_its_name_and_a_folder_of_that_name_by_its_path(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gemma3_270m, "cached_folder", lambda: FOLDERS / "text")
    copy_of("multimodal", tmp_path / "gemma3-270m")
    monkeypatch.chdir(tmp_path)
    assert open_source("gemma3-270m").path == FOLDERS / "text"
    assert open_source("./gemma3-270m").path == Path("gemma3-270m")


def test_a_folder_and_a_file_in_it_are_the_same_checkpoint():
    folder = open_source(str(FOLDERS / "text"))
    file = open_source(str(FOLDERS / "text" / "model-00002-of-00004.safetensors"))
    assert folder.path == file.path and folder.tensors.keys() == file.tensors.keys()


def test_an_orbax_checkpoint_and_the_folder_around_it_are_known_by_their_manifest(
    tmp_path, monkeypatch
):
    sizes = dict(vocab_size=37, num_layers=7, embed_dim=12, hidden_dim=22, num_heads=4)
    rest = dict(num_kv_heads=2, head_dim=6, sliding_window=4, query_pre_attn_scalar=3.0)
    monkeypatch.setitem(CONFIGS, "tiny", Gemma3Config(**sizes, **rest))
    shutil.copytree(ORBAX, tmp_path / "gemma" / "it")
    for where in (tmp_path / "gemma", tmp_path / "gemma" / "it"):
        assert open_source(str(where)).config.num_layers == 7


def test_a_model_at_kaggle_goes_by_its_handle(tmp_path, monkeypatch):
    monkeypatch.setattr(kaggle, "INPUT", tmp_path)
    folder = tmp_path / "gemma-3" / "transformers" / "gemma-3-1b-it" / "1"
    folder.parent.mkdir(parents=True)
    copy_of("text", folder)
    assert open_source("kagglehub:google/gemma-3/transformers/gemma-3-1b-it").path == folder


def test_what_is_not_there_is_refused_with_what_could_be(tmp_path):
    message = refusal(str(tmp_path / "nothing"))
    assert "no such folder, *.safetensors or *.gguf file; gemma3-nano and gemma3-270m" in message
    (tmp_path / "weights.bin").touch()
    assert "no such folder, *.safetensors or *.gguf file" in refusal(str(tmp_path / "weights.bin"))


def test_a_folder_of_something_else_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    assert "adapters alone, without their base" in refusal(str(tmp_path / "adapter"))
    words = "neither config.json (a Hugging Face folder) nor manifest.ocdbt (an Orbax checkpoint)"
    assert f"{words} in it; name another folder" in refusal(str(tmp_path))
    (tmp_path / "model.Q8_0.gguf").touch()
    assert "name model.Q8_0.gguf itself" in refusal(str(tmp_path))


def test_a_checkpoint_without_a_tokenizer_that_is_read_says_what_to_fetch(tmp_path):
    source = open_source(str(copy_of("text", tmp_path / "text")))
    with pytest.raises(UserError, match=r"no tokenizer.model \(nor a tokenizer.json\); fetch it"):
        tokenizer_path(source)
    (tmp_path / "text" / "tokenizer.json").touch()
    with pytest.raises(UserError, match="only tokenizer.json, which is not read"):
        tokenizer_path(source)

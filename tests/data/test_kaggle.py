"""Handles of Kaggle: both layouts of what is attached, then a stub of the package kagglehub."""

import sys
import types
from pathlib import Path

import pytest

from gemma_grpo.data import kaggle, sources
from gemma_grpo.errors import UserError

MODEL = "google/gemma-3/transformers/gemma-3-1b-it"
DATASET = "thedevastator/grade-school-math-8k-q-a"


@pytest.fixture(autouse=True)
def input_folder(tmp_path, monkeypatch) -> Path:
    """/kaggle/input, with nothing in it, and no kagglehub."""
    monkeypatch.setattr(kaggle, "INPUT", tmp_path / "input")
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    return tmp_path / "input"


def stub_kagglehub(monkeypatch, found: Path | Exception) -> list[tuple[str, str]]:
    """A kagglehub that finds this, or raises it; what it was asked for is in the list."""
    asked = []

    def download(kind: str):
        def one(handle: str) -> str:
            asked.append((kind, handle))
            if isinstance(found, Exception):
                raise found
            return str(found)

        return one

    stub = types.ModuleType("kagglehub")
    stub.model_download, stub.dataset_download = download("model"), download("data set")
    monkeypatch.setitem(sys.modules, "kagglehub", stub)
    return asked


def attach(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("layout", ["", "models/google"])
def test_an_attached_model_is_found_in_both_layouts_in_its_newest_version(input_folder, layout):
    place = input_folder / layout / "gemma-3" / "transformers" / "gemma-3-1b-it"
    versions = [attach(place / number) for number in ("9", "10", "2")]
    attach(place / "notes")
    assert kaggle.model_folder(f"kagglehub:{MODEL}") == versions[1]
    assert kaggle.model_folder(f"kagglehub:{MODEL}/2") == versions[2]
    with pytest.raises(UserError, match="not attached"):
        kaggle.model_folder(f"kagglehub:{MODEL}/3")


@pytest.mark.parametrize("layout", ["", "datasets/thedevastator"])
def test_an_attached_data_set_is_found_in_both_layouts(input_folder, layout):
    folder = attach(input_folder / layout / "grade-school-math-8k-q-a")
    assert kaggle.dataset_folder(f"kagglehub:{DATASET}") == folder


def test_what_is_attached_is_taken_without_asking_kagglehub(input_folder, monkeypatch):
    asked = stub_kagglehub(monkeypatch, ConnectionError("no network"))
    attach(input_folder / "gemma-3" / "transformers" / "gemma-3-1b-it" / "1")
    attach(input_folder / "grade-school-math-8k-q-a")
    kaggle.model_folder(f"kagglehub:{MODEL}"), kaggle.dataset_folder(f"kagglehub:{DATASET}")
    assert asked == []


def test_what_is_not_attached_is_fetched_by_kagglehub_under_the_same_name(tmp_path, monkeypatch):
    asked = stub_kagglehub(monkeypatch, tmp_path)
    for name in (MODEL, f"{MODEL}/3"):
        assert kaggle.model_folder(f"kagglehub:{name}") == tmp_path
    for name in (DATASET, f"{DATASET}/versions/2"):
        assert kaggle.dataset_folder(f"kagglehub:{name}") == tmp_path
    assert asked == [
        ("model", MODEL),
        ("model", f"{MODEL}/3"),
        ("data set", DATASET),
        ("data set", f"{DATASET}/versions/2"),
    ]


def test_a_data_set_of_a_version_is_never_taken_from_what_is_attached(
    input_folder, tmp_path, monkeypatch
):
    attach(input_folder / "grade-school-math-8k-q-a")  # which version it is, nobody can tell
    stub_kagglehub(monkeypatch, tmp_path / "fetched")
    assert kaggle.dataset_folder(f"kagglehub:{DATASET}/versions/2") == tmp_path / "fetched"


def test_without_the_package_one_line_says_where_was_looked_and_what_to_do(input_folder):
    for folder, handle in ((kaggle.model_folder, MODEL), (kaggle.dataset_folder, DATASET)):
        with pytest.raises(UserError) as caught:
            folder(f"kagglehub:{handle}")
        message = str(caught.value)
        assert str(input_folder) in message and "pip install 'gemma_grpo[kaggle]'" in message
        assert "\n" not in message


def test_what_kagglehub_raises_is_one_line(monkeypatch):
    stub_kagglehub(monkeypatch, RuntimeError("403 Client Error.\n\nPlease accept the terms"))
    with pytest.raises(UserError, match=r"fetch it \(403 Client Error\. Please accept the terms\)"):
        kaggle.model_folder(f"kagglehub:{MODEL}")


@pytest.mark.parametrize(
    "name",
    ["", "gemma-3", "google/gemma-3/transformers", f"{MODEL}/one", f"../../{MODEL}", "//a/b"],
)
def test_a_name_that_is_no_model_is_refused_with_the_form(name):
    with pytest.raises(UserError, match="kagglehub:OWNER/MODEL/FRAMEWORK/VARIATION"):
        kaggle.model_folder(f"kagglehub:{name}")


@pytest.mark.parametrize("name", ["", "slug", "a/b/c", "a/b/versions/x", "../b"])
def test_a_name_that_is_no_data_set_is_refused_with_the_form(name):
    with pytest.raises(UserError, match="kagglehub:OWNER/DATASET"):
        kaggle.dataset_folder(f"kagglehub:{name}")


def test_gsm8k_is_read_from_a_handle(input_folder):
    folder = attach(input_folder / "grade-school-math-8k-q-a")
    (folder / "main_test.csv").write_text("question,answer\nq?,#### 1\nr?,#### 2\n")
    found = sources.load(f"gsm8k:kagglehub:{DATASET}", split="test", num=0, seed=0)
    assert [(p.prompt, p.answer) for p in found] == [("q?", "1"), ("r?", "2")]

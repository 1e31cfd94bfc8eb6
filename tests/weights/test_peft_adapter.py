"""gemma_grpo.weights.peft_adapter: added to the modules that it names, an adapter is what was
trained; by hand on the folders that transformers wrote, and by PEFT where that is installed."""

import hashlib
import json
import re

import numpy as np
import pytest
import safetensors.numpy
from hf_folders import FOLDERS, all_tensors, copy_of, logits_of, save_as_one
from stubs import drawn_adapter
from tolerances import TRANSFORMERS_LOGITS

from gemma_grpo import model, weights
from gemma_grpo.model import LoRAConfig
from gemma_grpo.weights.hf_folder import open_folder
from gemma_grpo.weights.peft_adapter import hub_name
from gemma_grpo.weights.source import Source

LORA = LoRAConfig(rank=2, alpha=3.0, targets="q_proj|o_proj|down")
WRAPPER = "base_model.model."
IDS_BL = np.array([[2, 4, 10, 11, 7, 5, 9, 30]])


@pytest.fixture(params=["text", "multimodal"], scope="module")
def written(request, tmp_path_factory):
    """(base folder, adapter's folder, the logits of both merged as `export` merges them)."""
    folder, tmp_path = FOLDERS / request.param, tmp_path_factory.mktemp("peft")
    source = open_folder(folder)
    drawn = drawn_adapter(source.config, LORA, scale=1.0)
    weights.write_adapter(tmp_path / "adapter", drawn, LORA, base=source)
    base = weights.assemble(
        source, model.abstract(source.config)[1], dtype="float32", sharding=None
    )
    merged = model.merge_adapter(drawn, base, scale=LORA.alpha / LORA.rank)
    tensors = weights.hf_tensors(merged, source.config)
    weights.write_folder(
        tmp_path / "merged", tensors, source.config, dtype=np.dtype("float32"), tokenizer=None
    )
    return folder, tmp_path / "adapter", logits_of(open_folder(tmp_path / "merged"), IDS_BL)


def modules_of(folder):
    """A folder's tensors by the names in the class that transformers makes of it today."""
    renamed = {"language_model.model.": "model.language_model."}
    tensors = {}
    for name, tensor in all_tensors(folder).items():
        for old, new in renamed.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        else:
            if not name.startswith("model."):
                name = f"model.{name}"
        tensors[name] = tensor.astype(np.float32)
    return tensors


def test_the_adapter_added_to_the_modules_that_it_names_gives_the_merged_exports_logits(
    written, tmp_path
):
    folder, adapter, expected = written
    tensors, factors = modules_of(folder), safetensors.numpy.load_file(
        adapter / "adapter_model.safetensors"
    )  # fmt: skip
    named = {name.removesuffix(".lora_A.weight") for name in factors if "lora_A" in name}
    for name in named:
        down, up = (factors[f"{name}.lora_{side}.weight"] for side in "AB")
        tensors[f"{name.removeprefix(WRAPPER)}.weight"] += LORA.alpha / LORA.rank * up @ down
    by_hand = copy_of(folder.name, tmp_path / "by_hand")
    save_as_one(by_hand, tensors)
    actual = logits_of(open_folder(by_hand), IDS_BL)
    np.testing.assert_allclose(actual, expected, atol=TRANSFORMERS_LOGITS)


def test_the_settings_scale_the_adapters_as_they_were_trained(written):
    """PEFT adds lora_alpha / r times the product of the factors."""
    settings = json.loads((written[1] / "adapter_config.json").read_text())
    of = {"r": 2, "lora_alpha": 3.0, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
    assert {name: settings[name] for name in of} == of


def test_the_settings_name_the_adapted_modules_and_no_others_and_a_base_that_is_there(written):
    folder, adapter, _ = written
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)
    factors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    adapted = {name.removeprefix(WRAPPER).rpartition(".lora_")[0] for name in factors}
    modules = {name.removesuffix(".weight") for name in modules_of(folder)}
    targets = settings["target_modules"]
    if isinstance(targets, str):  # PEFT matches full names
        found = {name for name in modules if re.fullmatch(targets, name)}
    else:  # and the ends of names
        found = {name for name in modules if name.split(".")[-1] in targets}
    assert found == adapted


def test_the_sums_are_of_the_adapters_and_their_settings(written):
    _, adapter, _ = written
    expected = {
        name: hashlib.sha256((adapter / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    lines = (adapter / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{digest}  {name}" for name, digest in expected.items()]


@pytest.mark.parametrize(
    "where, size, name",
    [
        ("models/google/gemma-3/transformers/gemma-3-1b-it/1", "1b", "google/gemma-3-1b-it"),
        ("gemma-3-4b-pt", "4b", "google/gemma-3-4b-pt"),
        ("gemma-3-270m", "270m", "google/gemma-3-270m"),
        ("hub/models--own-er--my--fine.tune/snapshots/3ab8", "1b", "own-er/my--fine.tune"),
        ("gemma-3-1b-it", "4b", ""),  # another model in a folder of that name
        ("gemma-3-1b", "1b", ""),  # either of two
        ("gemma-3-1b-it-mine", "1b", ""),
        ("models--x--a b/snapshots/1", "1b", ""),
    ],
)
def test_the_hubs_name_of_a_base_is_read_from_its_path(tmp_path, where, size, name):
    folder = tmp_path / where
    folder.mkdir(parents=True)
    source = Source(folder, model.CONFIGS[f"gemma3-{size}"], {}, None)
    assert hub_name(source) == ""  # no folder in Hugging Face's format
    (folder / "config.json").touch()
    assert hub_name(source) == name


def test_an_adapter_names_its_base_as_the_hub_does(tmp_path):
    folder = copy_of("text", tmp_path / "models--owner--name")
    drawn = drawn_adapter((source := open_folder(folder)).config, LORA, scale=1.0)
    weights.write_adapter(tmp_path / "adapter", drawn, LORA, base=source, texts={"a.md": "b"})
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/name"
    assert (tmp_path / "adapter" / "a.md").read_text() == "b"


def test_peft_gives_the_merged_exports_logits(written):
    torch = pytest.importorskip("torch", reason="PEFT needs torch")
    peft = pytest.importorskip("peft", reason="checks the adapters by PEFT")
    transformers = pytest.importorskip("transformers", reason="PEFT needs transformers")
    folder, adapter, expected = written
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    both = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        actual = both(input_ids=torch.tensor(IDS_BL)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=TRANSFORMERS_LOGITS)

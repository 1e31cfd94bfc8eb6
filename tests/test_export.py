"""The export: the folder and the adapters are the run's model, and the card is its record.

Where transformers, torch and PEFT are installed, they load what was written.
"""

import ast
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flax import nnx
from stubs import drawn_adapter

from gemma_grpo import api, config, export, model, weights
from gemma_grpo.errors import UserError
from gemma_grpo.model import LoRAConfig
from gemma_grpo.runtime import ModelConfig

LORA = LoRAConfig(rank=2, alpha=4.0, targets="q_proj|o_proj|down")
SOURCE = weights.open_source(weights.NANO)
BASE = weights.assemble(SOURCE, model.abstract(SOURCE.config)[1], dtype="float32", sharding=None)
SUMMARY = {
    "stages": {
        "base": {"accuracy": 0.0, "accuracy_ci95": [0.0, 0.0126], "format_rate": 0.0, "n": 300},
        "sft": {"accuracy": 0.4567, "accuracy_ci95": [0.4, 0.51], "format_rate": 0.99, "n": 300},
    },
    "device": "2 x cpu (x86_64)",
    "versions": {"jax": "0.10.2"},
    "seed": 5,
}
IDS = np.array([[2, 4, 100, 101, 77, 5, 9, 300]])


def write_run(run_dir, lora):
    """A run directory with an SFT stage of drawn weights; the parameters to run it with."""
    if lora.rank:
        trained = drawn_adapter(SOURCE.config, lora, scale=0.1)
        full = model.join(trained, BASE)
    else:
        trained = full = jax.tree.map(lambda leaf: leaf * 1.01, BASE)
    settings = config.RunConfig(stages="sft", model=ModelConfig(lora=lora))
    (run_dir / "weights").mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config.to_yaml(settings))
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    weights.save(run_dir / "weights" / "sft.safetensors", trained)
    return full


def logits(params, lora):
    @jax.jit
    def run(params):
        gemma = nnx.merge(model.abstract(SOURCE.config, lora)[0], params)
        return gemma.logits(model.forward(gemma, jnp.asarray(IDS), jnp.ones(IDS.shape, bool))[0])

    return np.asarray(run(params))


@pytest.fixture(params=[LORA, model.NO_LORA], ids=["lora", "full"], scope="module")
def exported(request, tmp_path_factory):
    """(folder, run directory, adapters' settings, logits of the run's model)."""
    folder = tmp_path_factory.mktemp("export")
    full = write_run(folder / "run", request.param)
    assert export.main([str(folder / "run"), str(folder / "out")]) == 0
    return folder / "out", folder / "run", request.param, logits(full, request.param)


def test_the_exported_folder_is_a_checkpoint_with_the_runs_logits(exported):
    out, _, _, expected = exported
    again = weights.open_source(str(out))
    assert again.config == SOURCE.config
    params = weights.assemble(
        again, model.abstract(again.config)[1], dtype="float32", sharding=None
    )
    np.testing.assert_allclose(
        logits(params, model.NO_LORA), expected, atol=tolerances.TRANSFORMERS_LOGITS
    )
    assert (out / "tokenizer.model").read_bytes() == SOURCE.tokenizer.read_bytes()


def test_transformers_loads_the_folder_and_gives_the_runs_logits(exported):
    pytest.importorskip("torch", reason="transformers needs torch")
    transformers = pytest.importorskip("transformers", reason="checks the export by transformers")
    import torch

    out, _, _, expected = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        actual = theirs(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=tolerances.TRANSFORMERS_LOGITS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    turns = [{"role": "user", "content": "What is 12 + 7?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    from gemma_grpo.text.tokenizer import Tokenizer

    assert ids == Tokenizer(SOURCE.tokenizer).encode_prompt("What is 12 + 7?")


def test_peft_loads_the_adapters_and_gives_the_runs_logits(exported, tmp_path):
    out, run_dir, lora, expected = exported
    if not lora.rank:
        pytest.skip("no adapters")
    pytest.importorskip("torch", reason="PEFT needs torch")
    peft = pytest.importorskip("peft", reason="checks the adapters by PEFT")
    import torch
    import transformers

    from gemma_grpo.weights import assets

    assert export.main([str(run_dir), str(tmp_path / "adapter"), "--adapter"]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(assets.NANO)
    both = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        actual = both(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(actual, expected, atol=tolerances.TRANSFORMERS_LOGITS)


def test_the_card_says_what_the_run_measured_and_how_it_was_set(exported):
    out, run_dir, _, _ = exported
    card = (out / "README.md").read_text()
    assert (
        "45.7 %" in card and "40.0 % to 51.0 %" in card and "2 x cpu" in card and "seed 5" in card
    )
    assert (run_dir / "config.yaml").read_text().strip() in card
    assert "license: apache-2.0" in card and "Gemma Terms" not in card


def test_a_model_made_from_gemma_carries_its_terms(tmp_path):
    write_run(tmp_path, LORA)
    from gemma_grpo.records import model_card

    card = model_card.model_card(tmp_path, "sft", base="gemma3-270m", of_gemma=True)
    assert "license: gemma" in card and "Gemma Terms of Use" in card


def test_adapters_have_a_card_and_a_line_says_that_their_base_is_a_folder_of_this_machine(
    tmp_path, capsys
):
    write_run(tmp_path / "run", LORA)
    out = tmp_path / "adapters"
    assert export.main([str(tmp_path / "run"), str(out), "--adapter"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: adapter_config.json names a folder of this machine")
    assert said.count("\n") == 1 and f"as in {out / 'README.md'}" in said
    card = (out / "README.md").read_text()
    assert "library_name: peft\n" in card and "base_model:" not in card and "45.7 %" in card
    assert "`BASE` is the Hugging Face folder of `gemma3-nano`" in card
    assert (
        'turns = "<start_of_turn>user\\nWhat is 12 + 7?<end_of_turn>\\n<start_of_turn>model\\n"'
        in card
    )
    assert str(tmp_path) not in card.partition("## How it was trained")[0]


def test_a_card_names_a_base_that_is_known_at_hugging_face(tmp_path):
    write_run(tmp_path, LORA)
    from gemma_grpo.records import model_card

    of = {"base": "3ab8", "of_gemma": True, "hub_name": "google/gemma-3-1b-it"}
    for adapters in (True, False):
        use = model_card.Use(adapters=adapters)
        card = model_card.model_card(tmp_path, "sft", use=use, **of)
        assert "base_model: google/gemma-3-1b-it\n" in card and "3ab8" not in card
        assert ('base = AutoModelForCausalLM.from_pretrained("google/gem' in card) == adapters


def snippet(card):
    """The Python that the card shows."""
    return card.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("adapters", [True, False])
def test_a_card_asks_as_the_run_did_within_its_budget(tmp_path, adapters):
    write_run(tmp_path, LORA)
    from gemma_grpo.records import model_card

    use = model_card.Use('Say "why".\nWhat is 12 + 7?', 60, adapters)
    card = model_card.model_card(tmp_path, "sft", base="x", of_gemma=False, use=use)
    literal = ast.parse(snippet(card))
    texts = [node.value for node in ast.walk(literal) if isinstance(node, ast.Constant)]
    asked = use.question
    assert 60 in texts and 256 not in texts
    turns = f"<start_of_turn>user\n{asked}<end_of_turn>\n<start_of_turn>model\n"
    assert (turns if adapters else asked) in texts


def test_the_exported_card_has_the_instruction_and_the_budget_of_the_run(tmp_path):
    write_run(tmp_path / "run", model.NO_LORA)
    path = tmp_path / "run" / "config.yaml"
    changed = path.read_text().replace("instruction: ''", "instruction: Think.")
    path.write_text(changed.replace("max_completion_length: 60", "max_completion_length: 50"))
    card = (api.load(tmp_path / "run").export(tmp_path / "out") / "README.md").read_text()
    assert '"content": "Think.\\nWhat is 12 + 7?"' in card and "max_new_tokens=50" in card


def test_a_card_claims_the_format_unless_no_measured_completion_has_it(tmp_path):
    write_run(tmp_path, model.NO_LORA)
    from gemma_grpo.records import model_card

    of = lambda stage: model_card.model_card(tmp_path, stage, base="x", of_gemma=False)
    claim = "answers a user's turn with"
    assert claim in of("sft") and claim in of("grpo")  # 99 %, and not measured
    assert claim not in of("base")  # 0 %


@pytest.mark.parametrize("summary", [{"unfinished": {"stage": "sft", "num_steps": 300}}, {}])
def test_a_stage_that_was_cut_short_is_exported_with_a_line_and_a_card_that_say_so(
    tmp_path, capsys, summary
):
    run_dir, out = tmp_path / "run", tmp_path / "out"
    write_run(run_dir, model.NO_LORA)
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY | summary))
    weight = run_dir / "weights" / "sft.safetensors"
    weight.rename(weight.with_name("sft-step-000038.safetensors"))
    assert export.main([str(run_dir), str(out)]) == 0
    of = " of 300" if summary else ""
    where = f"stage sft, step 38{of}, is not finished"
    goes_on = "--resume (in Python gemma_grpo.resume) goes on"
    assert capsys.readouterr().err == f"warning: {where}; {goes_on}\n"
    assert f"It was cut short: {where}." in (out / "README.md").read_text()


@pytest.mark.parametrize("damage", ["", "[1]", '{"stages": ', '{"stages": 3}'])
def test_a_card_passes_over_a_damaged_summary_and_takes_the_evaluations(tmp_path, damage):
    write_run(tmp_path, model.NO_LORA)
    from gemma_grpo.records import model_card

    (tmp_path / "summary.json").write_text(damage)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "base.json").write_text("")
    (tmp_path / "evaluations" / "sft.json").write_text(json.dumps(SUMMARY["stages"]["sft"]))
    card = model_card.model_card(tmp_path, "sft", base="gemma3-nano", of_gemma=False)
    assert "45.7 %" in card and "base   " not in card


@pytest.mark.parametrize("versions", [None, "x", [], 3])
def test_a_card_leaves_out_versions_that_are_damaged(tmp_path, versions):
    write_run(tmp_path, model.NO_LORA)
    from gemma_grpo.records import model_card

    summary = SUMMARY | {"versions": versions, "stages": SUMMARY["stages"] | {"grpo": 7}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    card = model_card.model_card(tmp_path, "sft", base="gemma3-nano", of_gemma=False)
    assert "45.7 %" in card and "seed" not in card.partition("## Use")[0]


def test_bfloat16_halves_the_file(exported, tmp_path):
    out, run_dir, _, _ = exported
    assert export.main([str(run_dir), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    sizes = [(path / "model.safetensors").stat().st_size for path in (out, tmp_path / "half")]
    assert 1.9 < sizes[0] / sizes[1] < 2.0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nowhere", "out"], "nowhere"),
        (["{run}", "{out}"], "there already"),
        (["{run}", "new", "--stage", "grpo"], "has weights of sft alone"),
        (["{run}", "."], "the folder you are in"),
        (["{run}", "~nobody-of-that-name/out"], "set HOME"),
    ],
)
def test_bad_input_is_one_line(exported, tmp_path, capsys, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    out, run_dir, _, _ = exported
    filled = [argument.format(run=run_dir, out=out) for argument in arguments]
    assert export.main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_is_none_of_three_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="dtype='fp16': use one of float32, bfloat16, float16"):
        api.Result(tmp_path, config.RunConfig()).export(tmp_path / "out", dtype="fp16")


def test_a_run_without_adapters_has_none_to_export(tmp_path, capsys):
    write_run(tmp_path / "run", dataclasses.replace(LORA, rank=0))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"]) == 2
    assert "no adapters" in capsys.readouterr().err

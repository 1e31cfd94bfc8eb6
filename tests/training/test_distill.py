"""On-policy distillation: a student of another size, what a run has left as teacher, resuming."""

import functools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from flax import nnx
from stubs import PAD, TINY, drawn_adapter, drawn_model, tiny_model, tiny_prompts

from benchmarks.campaign import models
from gemma_grpo import config, model, pipeline, presets, runtime, weights
from gemma_grpo.devices import mesh
from gemma_grpo.errors import UserError
from gemma_grpo.generation.rollout import RolloutConfig, make_rollout
from gemma_grpo.model import LoRAConfig, ModelConfig
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.records import origin
from gemma_grpo.training import grpo_update
from gemma_grpo.training import state as train_state
from gemma_grpo.training.logps import batch_logps
from gemma_grpo.training.update import UpdateConfig

P, G, T = 8, 8, 4


@functools.partial(jax.jit, static_argnums=0)
def next_token_logps(graphdef, params, prompts):
    """Of every token of the vocabulary after each prompt, [P, V]."""
    ids, mask = map(jnp.asarray, prompts)
    module = nnx.merge(graphdef, params)
    hidden, _ = model.forward(module, ids, mask)
    return jax.nn.log_softmax(module.logits(hidden[:, -1]))


def test_a_student_comes_to_the_distribution_of_a_larger_teacher_without_any_reward():
    graphdef, params = tiny_model(scale=1.5)
    larger = replace(TINY, num_layers=3, embed_dim=24, num_kv_heads=4)
    of_teacher = drawn_model(larger, seed=5)
    one, prompts = mesh.data_mesh(jax.devices()[:1]), tiny_prompts(P)
    wanted = next_token_logps(*of_teacher, prompts)

    def exact_kl(params):
        own = next_token_logps(graphdef, params, prompts)
        return np.sum(np.exp(own) * (own - wanted), axis=1).mean()

    optimizer = optax.adam(1e-2)
    roll = make_rollout(graphdef, one, RolloutConfig(G, T, stop_ids=(), pad_id=PAD))
    score = grpo_update.make_score(of_teacher[0], one, temperature=1.0, dtype="float32")
    loss = LossConfig(policy_weight=0.0)
    update = grpo_update.make_update(
        graphdef, one, optimizer, loss, UpdateConfig("float32", "none"), temperature=1.0
    )
    state, pulling = train_state.init_train_state(params, optimizer, one), np.full(P * G, 9.0)
    before, measured = exact_kl(params), []
    for step in range(30):
        drawn = roll(state.params, *prompts, jax.random.key(step))
        batch = grpo_update.make_batch(*prompts, jax.device_get(drawn), pulling, loss)
        (teacher_logps,) = score(of_teacher[1], {}, (batch,))
        state, metrics = update(state, {}, (batch | {"teacher_logps": teacher_logps},))
        measured.append(float(metrics["teacher_kl"]))
    assert exact_kl(state.params) < before / 3
    assert np.mean(measured[-5:]) < np.mean(measured[:5]) / 2


# --- a teacher that a run has left ---


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """The folder of a model of two layers, one more than `one_layer`."""
    return str(models.cut_nano(tmp_path_factory.mktemp("models") / "two_layers", (0, 5)))


def left_by_a_run(folder, settings, params):
    """A run's folder, as far as a teacher is looked for in it."""
    run = replace(config.RunConfig(), model=settings)
    pipeline.new_run_dir(folder, run)
    weights.save(folder / "weights" / "grpo.safetensors", params)
    origin.note(folder, {"base weights": weights.digest(settings.weights)})
    return str(folder)


@functools.partial(jax.jit, static_argnums=0)
def logps_of(graphdef, params):
    prompt_ids, prompt_mask = tiny_prompts(4)
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": np.arange(24, dtype=np.int32).reshape(4, 6),
        "completion_mask": np.ones((4, 6), bool),
    }
    batch = jax.tree.map(jnp.asarray, batch)
    return batch_logps(nnx.merge(graphdef, params), batch)[0]


def load(run):
    student, _ = runtime.load_model(run.model, seed=0)
    return pipeline._load_teacher(run, student)


def with_teacher(student, teacher, **settings):
    run = presets.preset("gemma3-nano").replace({"model.weights": student} | settings)
    return run.replace({"grpo.teacher": teacher})


@pytest.mark.parametrize("rank", [0, 3])
def test_a_run_s_weights_or_adapters_are_the_teacher_and_not_its_base(
    tmp_path, one_layer, two_layers, rank
):
    settings = ModelConfig(weights=two_layers, lora=LoRAConfig(rank=rank, alpha=5.0))
    trained, params = runtime.load_model(settings, seed=0)
    if rank:
        sizes = weights.open_source(two_layers).config
        params = drawn_adapter(sizes, settings.lora, scale=0.05)
    else:
        params = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    expected = logps_of(trained.graphdef, model.join(params, trained.frozen))
    where = left_by_a_run(tmp_path / "run", settings, params)
    teacher = load(with_teacher(one_layer, where))
    actual = logps_of(teacher.graphdef, teacher.params)
    np.testing.assert_allclose(actual, expected, atol=tolerances.LOGP_GAP)
    of_base = load(with_teacher(one_layer, two_layers))
    assert np.abs(logps_of(of_base.graphdef, of_base.params) - expected).max() > 0.01


def test_a_teacher_is_computed_in_the_student_s_dtype_and_sharded(
    monkeypatch, one_layer, two_layers
):
    monkeypatch.setattr(mesh, "FSDP_FROM", 1024)
    teacher = load(with_teacher(one_layer, two_layers, **{"model.dtype": "bfloat16"}))
    assert {leaf.dtype for leaf in jax.tree.leaves(teacher.params)} == {jnp.dtype("bfloat16")}
    embedding = teacher.params["embedding"]
    assert len(embedding.sharding.device_set) == 8
    assert embedding.addressable_shards[0].data.size == embedding.size // 8


def test_a_teacher_that_cannot_be_used_is_one_line_with_its_setting(
    tmp_path, one_layer, two_layers, monkeypatch
):
    def says(teacher):
        with pytest.raises(UserError) as caught:
            load(with_teacher(one_layer, teacher))
        line = str(caught.value)
        assert line.startswith("grpo.teacher: ") and "\n" not in line
        return line

    unfinished = replace(config.RunConfig(), model=ModelConfig(weights=two_layers))
    pipeline.new_run_dir(tmp_path / "unfinished", unfinished)
    assert "no stage has finished" in says(str(tmp_path / "unfinished"))
    settings = ModelConfig(weights=two_layers)
    _, params = runtime.load_model(settings, seed=0)
    damaged = left_by_a_run(tmp_path / "damaged", settings, params)
    file = tmp_path / "damaged" / "weights" / "grpo.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert "its bytes have changed" in says(damaged)
    file.write_bytes(file.read_bytes()[:-9])
    assert "incomplete or damaged" in says(damaged)
    other = models.cut_nano(tmp_path / "other")
    (other / "tokenizer.model").write_bytes(swapped_pieces(other / "tokenizer.model"))
    line = says(str(other))
    assert "a teacher must have the student's tokenizer, but token 300 is" in line
    adapters = ModelConfig(weights=two_layers, lora=LoRAConfig(rank=2))
    trained = left_by_a_run(tmp_path / "adapters", adapters, {})
    monkeypatch.setattr(weights, "digest", lambda where: "another")
    assert "base weights are not what the run began with" in says(trained)


def swapped_pieces(path):
    """The tokenizer with its tokens 300 and 301 in each other's place."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    first, second = proto.pieces[300], proto.pieces[301]
    first.piece, second.piece = second.piece, first.piece
    return proto.SerializeToString()


# --- a run ---


def test_adapters_distil_a_larger_model_over_two_devices_and_resume_to_the_same_bits(
    tmp_path, one_layer, two_layers, monkeypatch
):
    """In packs, with dropout, beside GRPO's own loss."""
    small = {
        "stages": "grpo",
        "model.lora.rank": 2,
        "model.lora.dropout": 0.1,
        "model.max_completion_length": 16,
        "data.num_train": 30,
        "data.num_test": 8,
        "evaluation.batch_size": 8,
        "evaluation.num_samples": 0,
        "grpo.num_steps": 3,
        "grpo.prompts_per_step": 4,
        "grpo.num_generations": 2,
        "grpo.scale": "batch",
        "grpo.pack_tokens": 96,
        "grpo.checkpoint_every": 2,
        "keep_checkpoints": True,
    }
    two, data_mesh = jax.devices()[:2], mesh.data_mesh
    monkeypatch.setattr(mesh, "data_mesh", lambda devices=two: data_mesh(devices))
    run = with_teacher(one_layer, two_layers, **small)
    pipeline.new_run_dir(tmp_path / "whole", run)
    pipeline.execute(run, tmp_path / "whole", quiet=True)
    steps = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert [line["logp_gap/mean"] for line in steps] == [None] * 3  # sampling drops nothing
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")  # as it was after its second step
    for path in ("weights", "evaluations/grpo.json", "checkpoints/grpo/000003"):
        shutil.rmtree(cut / path) if (cut / path).is_dir() else (cut / path).unlink()
    pipeline.execute(run, cut, quiet=True)
    assert (cut / "checkpoints/grpo/000003").is_dir()
    left = [tmp_path / name / "weights" / "grpo.safetensors" for name in ("whole", "cut")]
    assert left[0].read_bytes() == left[1].read_bytes()
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["teacher_kl"] > 0 for line in lines)
    # Another teacher in the same place is not gone on with, unless that is said.
    other = run.replace({"grpo.teacher": one_layer})
    digests = pipeline._digests(other, pipeline.load_task(other))
    with pytest.raises(
        UserError, match="its teacher weights are not what the run began with.*base$"
    ):
        pipeline._check_origin(other, tmp_path / "cut", digests, ["data"])
    pipeline._check_origin(other, tmp_path / "cut", digests, ["base"])
    assert (tmp_path / "cut" / "evaluations" / "base.json").is_file()

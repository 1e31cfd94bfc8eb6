"""A rehearsal of `train` on eight devices: every pair of settings goes through.

Each runs from the command line to the end, then again in sessions that end within a stage and
between the two, and is evaluated, sampled from and exported. The model is a cut of two layers, a
sliding one and a global one: of the embedded model, or of Gemma 3 1B's widths (slow). Of the three
that are not slow one is cut at every border, one within GRPO and one not at all.
"""

import itertools
import json
import shutil
import threading
from dataclasses import dataclass

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from benchmarks.campaign import models
from gemma_grpo import cli, evaluate, export, generate, train, weights
from gemma_grpo.presets import PRESETS
from gemma_grpo.records import compile_clock
from gemma_grpo.records.metrics import MetricsWriter
from gemma_grpo.runtime import Runtime
from gemma_grpo.training import deadline
from gemma_grpo.weights.assets import NANO

STEPS = 3  # a stage; after the second nothing may be compiled
ADAPTERS = {
    "all weights": [],
    "adapters": ["--model.lora.rank", "4"],
    "adapters with dropout": ["--model.lora.rank", "4", "--model.lora.dropout", "0.1"],
}
STAGES = ("sft,grpo", "sft", "grpo")
TOKENS = 4096  # divides over eight devices in blocks of 512
# Gemma 3 1B's, but for its vocabulary: that of the embedded tokenizer stands in.
WIDTHS_1B = {"hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4}
WIDTHS_1B |= {"num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}


@pytest.fixture(autouse=True)
def eight_devices(monkeypatch):
    """The command sets the number of CPU devices, which this process has fixed at eight."""
    monkeypatch.setattr(cli, "split_cpu", lambda *sizes: None)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """The first and the last layer of the embedded model."""
    cut = models.cut_nano(tmp_path_factory.mktemp("cut") / "nano", layers=(0, 5))
    tensors = safetensors.numpy.load_file(cut / "model.safetensors")
    return write_folder(tmp_path_factory.mktemp("two_layers"), tensors, {})


@pytest.fixture(scope="module")
def two_layers_1b(tmp_path_factory):
    """Drawn weights of the 1B's widths."""
    D, F = WIDTHS_1B["hidden_size"], WIDTHS_1B["intermediate_size"]
    N, H = WIDTHS_1B["num_attention_heads"], WIDTHS_1B["head_dim"]
    shapes = {"model.embed_tokens": (512, D), "model.norm": (D,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {
            f"{layer}.self_attn.q_proj": (N * H, D),
            f"{layer}.self_attn.k_proj": (H, D),
            f"{layer}.self_attn.v_proj": (H, D),
            f"{layer}.self_attn.o_proj": (D, N * H),
            f"{layer}.self_attn.q_norm": (H,),
            f"{layer}.self_attn.k_norm": (H,),
            f"{layer}.mlp.gate_proj": (F, D),
            f"{layer}.mlp.up_proj": (F, D),
            f"{layer}.mlp.down_proj": (D, F),
            f"{layer}.input_layernorm": (D,),
            f"{layer}.post_attention_layernorm": (D,),
            f"{layer}.pre_feedforward_layernorm": (D,),
            f"{layer}.post_feedforward_layernorm": (D,),
        }
    rng = np.random.default_rng(0)
    drawn = lambda shape: rng.normal(0, 0.02, shape).astype(ml_dtypes.bfloat16)
    tensors = {f"{name}.weight": drawn(shape) for name, shape in shapes.items()}
    return write_folder(tmp_path_factory.mktemp("two_layers_1b"), tensors, WIDTHS_1B)


def write_folder(folder, tensors, changes):
    """A Hugging Face folder with the embedded model's tokenizer, filled up with unused tokens to as
    many as the tensor-parallel layout divides by; `changes` to its config.json."""
    name = "model.embed_tokens.weight"
    tensors[name] = np.pad(tensors[name], ((0, TOKENS - len(tensors[name])), (0, 0)))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    settings = json.loads((NANO / "config.json").read_text())
    cut = {"num_hidden_layers": 2, "sliding_window_pattern": 2, "vocab_size": TOKENS}
    cut["layer_types"] = ["sliding_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(settings | cut | changes))
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    tokenizer = proto.ModelProto.FromString((NANO / "tokenizer.model").read_bytes())
    for number in range(len(tokenizer.pieces), TOKENS):
        tokenizer.pieces.add(piece=f"<unused{number}>", type=proto.ModelProto.SentencePiece.UNUSED)
    (folder / "tokenizer.model").write_bytes(tokenizer.SerializeToString())
    shutil.copy(NANO / "tokenizer_config.json", folder)
    return folder


@dataclass(frozen=True)
class Case:
    """One combination of what the flags allow."""

    preset: str = "gemma3-nano"
    adapters: str = "all weights"
    layout: str = "data"
    beta: float = 0.0
    num_iterations: int = 1
    stages: str = "sft,grpo"

    def __str__(self):
        parts = (self.preset, self.adapters, self.layout, f"beta={self.beta}")
        return " ".join([*parts, f"mu={self.num_iterations}", self.stages])

    def arguments(self, folder, tmp_path):
        """Of `train`: the preset, cut in its lengths and numbers, not in what it switches on."""
        packs = "256" if PRESETS[self.preset].grpo.pack_tokens else "0"
        has_folder = PRESETS[self.preset].checkpoint.folder
        return [
            *("--preset", self.preset, "--model.weights", str(folder), "--stages", self.stages),
            *("--data.source", "curriculum", "--data.num-train", "60", "--data.num-test", "8"),
            *("--model.max-prompt-length", "48", "--model.max-completion-length", "60"),
            *("--model.instruction", ""),
            *("--model.rollout-layout", self.layout, *ADAPTERS[self.adapters]),
            *("--sft.num-steps", str(STEPS), "--sft.batch-size", "8"),
            *("--sft.pack-tokens", packs, "--grpo.pack-tokens", packs),
            *("--grpo.num-steps", str(STEPS), "--grpo.prompts-per-step", "8"),
            *("--grpo.num-generations", "4", "--grpo.num-iterations", str(self.num_iterations)),
            *("--grpo.loss.beta", str(self.beta), "--grpo.curriculum", "phases"),
            *("--evaluation.batch-size", "16", "--evaluation.num-samples", "2"),
            *("--checkpoint.folder", str(tmp_path / "checkpoints") if has_folder else ""),
        ]


def borders(case):
    """Steps, each of an hour, after which sessions end: one within the first stage, one after it,
    one within the last."""
    return [1, *range(STEPS, STEPS * len(case.stages.split(",")), STEPS - 1)]


class ClockOfTraining(compile_clock.CompileClock):
    """Leaves out what is compiled ahead, in other threads."""

    def _note(self, event, duration_secs, **names):
        if threading.current_thread() is threading.main_thread():
            super()._note(event, duration_secs, **names)


def rehearse(case, folder, tmp_path, monkeypatch, cuts):
    """The whole of it; asserts what must hold of any run.

    Args:
        cuts: steps after which a session ends; none runs it once.
    """
    arguments = case.arguments(folder, tmp_path)
    keep_weights_off_the_host(monkeypatch)
    monkeypatch.setattr(compile_clock, "CompileClock", ClockOfTraining)
    with compile_clock.running() as clock:
        compiled = seconds_after_steps(clock, monkeypatch)
        assert train.main(["--run-dir", str(tmp_path / "whole"), *arguments]) == 0
    assert not list((tmp_path / "whole").glob("checkpoints/*"))
    for stage in case.stages.split(","):
        assert compiled[stage, 2] == compiled[stage, STEPS], "compiled in the middle of a stage"
    if cuts:
        last = cut_and_resume(arguments, tmp_path, monkeypatch, cuts)
        for stage in case.stages.split(","):
            name = f"weights/{stage}.safetensors"
            assert (last / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    use(tmp_path / "whole", tmp_path, case)


def cut_and_resume(arguments, tmp_path, monkeypatch, cuts):
    """The run in sessions, each of which ends after a step of `cuts`; the last one goes on from a
    read-only copy. Returns its folder."""
    run_dir = tmp_path / "cut"
    end_after_hours(monkeypatch, tmp_path)
    for step in cuts:
        begin = ["--resume"] if run_dir.exists() else arguments
        assert train.main(["--run-dir", str(run_dir), "--hours", f"{step}.5", *begin]) == 75
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)  # not kept after a session
    attached = tmp_path / "attached" / "cut"
    shutil.copytree(run_dir, attached)
    for path in [attached, *attached.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    last = tmp_path / "continued"
    assert train.main(["--run-dir", str(last), "--resume-from", str(attached)]) == 0
    return last


def use(run_dir, tmp_path, case):
    """Each command that takes a run."""
    run = str(run_dir)
    measure = ["--num", "8", "--out", str(tmp_path / "measured"), "--batch-size", "16"]
    measure += ["--num-samples", "2"]
    assert evaluate.main([run, *measure]) == 0
    assert generate.main([run, "--prompt", "What is 2 + 3?"]) == 0
    out = tmp_path / "exported"
    assert export.main([run, str(out)]) == 0
    assert weights.open_source(str(out)).config.num_layers == 2
    if case.adapters != "all weights":
        assert export.main([run, str(tmp_path / "adapter"), "--adapter"]) == 0


def seconds_after_steps(clock, monkeypatch):
    """The seconds that the process had compiled for at the end of each step, by (stage, step)."""
    write, after = MetricsWriter.write, {}

    def noted(self, stage, step, metrics):
        after[stage, step] = clock.seconds
        return write(self, stage, step, metrics)

    monkeypatch.setattr(MetricsWriter, "write", noted)
    return after


def keep_weights_off_the_host(monkeypatch):
    """Raises where the weights that are sampled with pass through the host."""
    sampling_params = Runtime.sampling_params

    def guarded(self, params):
        with jax.transfer_guard("disallow_explicit"):
            return sampling_params(self, params)

    monkeypatch.setattr(Runtime, "sampling_params", guarded)


def end_after_hours(monkeypatch, tmp_path):
    """The clock of the run in "cut" tells the hours by the steps taken: an hour each."""

    def seconds():
        lines = tmp_path / "cut" / "metrics.jsonl"
        return 3600.0 * len(lines.read_text().splitlines()) if lines.exists() else 0.0

    note = deadline.Deadline.note
    hour_a_step = lambda self, kind, spent: note(self, kind, 3600.0 if kind == "step" else 0.0)
    monkeypatch.setattr(deadline, "seconds_since_start", seconds)
    monkeypatch.setattr(deadline.Deadline, "note", hour_a_step)


WITH_CUTS = [
    (Case(beta=0.01, num_iterations=2), borders(Case())),
    (Case("gemma3-1b", layout="tensor_parallel"), []),
    (Case("gemma3-1b-lora", "adapters with dropout", "tensor_parallel", 0.01, 2), [STEPS + 1]),
]
SETTINGS = {
    "adapters": tuple(ADAPTERS),
    "layout": ("data", "tensor_parallel"),
    "beta": (0.0, 0.01),
    "num_iterations": (1, 2),
    "stages": STAGES,
}
OF_GRPO = {"beta", "num_iterations"}  # settings that SFT alone does not read
# All 72 combinations would take 100 minutes of CPU; these hold each pair of settings.
PAIRS = [
    Case("gemma3-1b", *settings)
    for settings in (
        ("all weights", "data", 0.0, 1, "sft"),
        ("all weights", "data", 0.01, 1, "grpo"),
        ("all weights", "tensor_parallel", 0.0, 2, "sft,grpo"),
        ("adapters", "data", 0.0, 1, "sft,grpo"),
        ("adapters", "data", 0.0, 1, "sft"),
        ("adapters", "tensor_parallel", 0.01, 2, "grpo"),
        ("adapters with dropout", "data", 0.0, 2, "grpo"),
        ("adapters with dropout", "tensor_parallel", 0.0, 1, "sft"),
        ("adapters with dropout", "tensor_parallel", 0.01, 1, "sft,grpo"),
    )
]
OF_PRESETS = [
    Case(name, "adapters" if preset.model.lora.rank else "all weights", preset.model.rollout_layout)
    for name, preset in PRESETS.items()
]


@pytest.mark.parametrize("case, cuts", WITH_CUTS, ids=str)
def test_a_run_goes_through_on_eight_devices_and_resumes_where_it_was_cut(
    case, cuts, two_layers, tmp_path, monkeypatch
):
    rehearse(case, two_layers, tmp_path, monkeypatch, cuts)


def test_the_cases_hold_each_pair_of_settings():
    for one, other in itertools.combinations(SETTINGS, 2):
        tried = {
            (getattr(case, one), getattr(case, other))
            for case in PAIRS
            if case.stages != "sft" or not OF_GRPO & {one, other}
        }
        possible = set(itertools.product(SETTINGS[one], SETTINGS[other]))
        if other == "stages" and one in OF_GRPO:
            possible = {pair for pair in possible if pair[1] != "sft"}
        assert tried == possible, (one, other)


@pytest.mark.slow
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_every_pair_of_settings_goes_through_on_eight_devices(
    case, two_layers, tmp_path, monkeypatch
):
    rehearse(case, two_layers, tmp_path, monkeypatch, borders(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_PRESETS, ids=str)
def test_every_preset_goes_through_at_the_widths_of_the_1b(
    case, two_layers_1b, tmp_path, monkeypatch
):
    rehearse(case, two_layers_1b, tmp_path, monkeypatch, borders(case))

"""The programs of the plan are those that training runs, and what its ledger counts of a step is
what a step moves."""

import contextlib
import json
import threading
from collections import Counter
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.campaign import models
from gemma_grpo import cli, pipeline, presets, train
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh
from gemma_grpo.planning import ledger, programs
from gemma_grpo.records.metrics import MetricsWriter
from gemma_grpo.training import demonstrations

# JAX's names of what our own code jits; besides, it compiles single operations.
OURS = {
    "jit(fresh_state)",
    "jit(resharded)",
    "jit(rollout)",
    "jit(score)",
    "jit(sharded_group_advantages)",
    "jit(update)",
}
STEPS = 4
TINY = [
    *("--data.num-test", "8", "--evaluation.batch-size", "16", "--evaluation.num-samples", "2"),
    *("--model.max-completion-length", "24", "--sft.batch-size", "8"),
    *("--grpo.prompts-per-step", "8", "--grpo.num-generations", "2"),
    *("--sft.num-steps", str(STEPS), "--grpo.num-steps", str(STEPS)),
]  # fmt: skip
PACKED = ["--sft.pack-tokens", "96", "--grpo.pack-tokens", "96"]
CASES = {
    "all weights, in packs, with a reference and old log-probs": [
        *("--model.dtype", "bfloat16", *PACKED),
        *("--grpo.loss.beta", "0.1", "--grpo.num-iterations", "2"),
    ],
    "adapters with dropout, own demonstrations": [
        *("--model.lora.rank", "2", "--model.lora.dropout", "0.1", "--sft.demonstrations", "own"),
        *("--sft.own.shots", "1", "--sft.own.shots-length", "100", "--sft.own.num-problems", "20"),
    ],
}


@contextlib.contextmanager
def compilations():
    """The programs that the block compiles or reads from the cache, by JAX's name, with "hits" or
    "misses" and the thread: of those compiled ahead, another than the block's."""
    seen, last = Counter(), {}

    def note(event, **_):
        if event.startswith("/jax/compilation_cache/cache_"):
            last[threading.current_thread()] = event.rpartition("_")[2]

    def note_seconds(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            thread = threading.current_thread()
            seen[fun_name, last[thread], thread] += 1

    jax.monitoring.register_event_listener(note)
    jax.monitoring.register_event_duration_secs_listener(note_seconds)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(note)
        jax.monitoring.unregister_event_duration_listener(note_seconds)


@contextlib.contextmanager
def empty_cache(folder):
    """Of compiled programs, which are compiled quickly."""
    directory, seconds = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in (directory, seconds)}
    for settings in ({directory: str(folder), seconds: 0}, before):
        jax.config.update("jax_disable_most_optimizations", settings is not before)
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is not before:
            yield


def short_problems(path):
    """Of many lengths."""
    rows = [
        {"prompt": f"{'1+' * (n % 7)}{n}?", "answer": str(n), "completion": f"{n}" * (1 + n % 9)}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run_of(arguments):
    parsed = cli.parse_run(
        arguments, train.Options(), presets.preset("gemma3-nano"), command="", description=""
    )
    return parsed[1]


def compile_all(run):
    architecture, ids = programs.model_of(run.model)
    found = programs.of_run(run, architecture, mesh.data_mesh(), ids)
    for program in found:
        program.trace().lower().compile()
    return [program.name for program in found]


@contextlib.contextmanager
def bytes_over_the_bus():
    """Bytes of the arrays that the block takes to the devices and from them: [up, down]."""
    passed = [0, 0]

    def counted(function, side, argument, kind):
        def call(*arguments):
            leaves = jax.tree.leaves(arguments[argument])
            arrays = [leaf for leaf in leaves if isinstance(leaf, kind) and leaf.ndim]
            passed[side] += sum(leaf.nbytes for leaf in arrays)
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name, side, argument, kind in (
            (mesh, "place_rows", 0, 1, np.ndarray),
            (mesh, "place_own_rows", 0, 1, np.ndarray),
            (jax, "device_get", 1, 0, jax.Array),
        ):
            patch.setattr(module, name, counted(getattr(module, name), side, argument, kind))
        yield passed


@dataclass
class Ran:
    """A run that was planned and then trained.

    Attributes:
        planned, trained: its programs, as `compilations` has them.
        names: that the plan gives them.
        compiled: programs that training itself compiled until a step of a stage was through.
        passed: bytes over the bus until then.
    """

    run: RunConfig
    planned: Counter
    names: list[str]
    trained: Counter
    compiled: dict
    passed: dict


FIRST, *OTHERS = CASES


@pytest.fixture(
    scope="module", params=[FIRST, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)]
)
def ran(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    where = ["--data.source", short_problems(folder / "short.jsonl")]
    where += ["--model.weights", str(models.cut_nano(folder / "model"))]
    where += ["--grpo.teacher", str(models.cut_nano(folder / "teacher", (0, 5)))]
    run = run_of([*TINY, *CASES[request.param], *where])
    compiled, passed, write = {}, {}, MetricsWriter.write
    with empty_cache(folder / "cache"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "FSDP_FROM", 1024)  # else all of so small a model is replicated
        # The model gets none right: its problems are imitated with what they came with.
        some = lambda asked, *_: demonstrations.Own(list(asked), {"kept": len(asked)})
        patch.setattr(demonstrations, "select", some)
        patch.setattr(demonstrations, "in_words", str)
        with compilations() as planned:
            names = compile_all(run)
        jax.clear_caches()  # as of a process that begins: only what is on file is left
        pipeline.new_run_dir(folder / "run", run)
        with compilations() as trained, bytes_over_the_bus() as bus:
            own = threading.current_thread()

            def note(writer, stage, step, metrics):
                compiled[stage, step] = sum(n for key, n in trained.items() if key[2] is own)
                passed[stage, step] = tuple(bus)
                write(writer, stage, step, metrics)

            patch.setattr(MetricsWriter, "write", note)
            pipeline.execute(run, folder / "run")
    return Ran(run, planned, names, trained, compiled, passed)


@pytest.mark.parametrize("shots, slots", [(4, 48 + 1024), (0, 48)])
def test_the_prompts_of_own_demonstrations_have_room_for_the_worked_problems(shots, slots):
    run = run_of([*TINY, "--sft.demonstrations", "own", "--sft.own.shots", str(shots)])
    architecture, ids = programs.model_of(run.model)
    devices = mesh.data_mesh(jax.devices()[:2])
    found = programs.of_run(run, architecture, devices, ids)
    own = {program.name: program for program in found}["own"]
    assert own.size == (16, 4) and own.arguments[1].shape == (16, slots)
    given = programs.of_run(run_of(TINY), architecture, devices, ids)
    assert [each.name for each in found if each.name != "own"] == [each.name for each in given]
    assert "own" not in [
        each.name for each in programs.of_run(run, architecture, devices, ids, ["grpo"])
    ]


def test_equal_settings_give_the_functions_that_were_made_before():
    devices, found = mesh.data_mesh(jax.devices()[:2]), []
    for _ in range(2):
        architecture, ids = programs.model_of(run_of(TINY).model)
        found.append(programs.of_run(run_of(TINY), architecture, devices, ids))
    for one, other in zip(*found, strict=True):
        assert (one.function is other.function) == (one.name != "state"), one.name
    hotter = run_of([*TINY, "--grpo.temperature", "1.5"])
    others = programs.of_run(hotter, architecture, devices, ids)
    differ = {a.name for a, b in zip(found[0], others, strict=True) if a.function is not b.function}
    assert differ == {"state", "rollout", "update"}


def test_training_compiles_no_program_of_its_own_that_the_plan_has_not(ran):
    planned = {name for name, *_ in ran.planned}
    assert ran.planned.total() == len(ran.names) and planned <= OURS
    assert not OURS & {name for name, how, _ in ran.trained if how == "misses"}
    assert {name for name, how, _ in ran.trained if how == "hits"} >= planned


def test_training_itself_compiles_no_program_that_was_compiled_ahead(ran):
    own = threading.current_thread()
    assert {name for name, _, thread in ran.trained if thread is own} & OURS == {"jit(fresh_state)"}
    for name in OURS - {"jit(fresh_state)"}:
        count = lambda seen, name=name: sum(n for key, n in seen.items() if key[0] == name)
        assert count(ran.trained) == count(ran.planned), name


def test_after_a_stages_second_step_nothing_is_compiled_whatever_lengths_come(ran):
    for stage in ran.run.stage_list:
        assert ran.compiled[stage, 2] == ran.compiled[stage, STEPS]


def test_the_bytes_of_a_step_over_the_bus_are_those_of_the_ledger(ran):
    lines = {line.name: line.most for line in ledger.bus_lines(ran.run, 8)}
    for stage, name in (("sft", "an SFT step"), ("grpo", "a GRPO step")):
        before, after = ran.passed[stage, 2], ran.passed[stage, 3]
        up, down = (b - a for a, b in zip(before, after, strict=True))
        assert up == lines[f"{name}, to the devices"]
        assert down == lines.get(f"{name}, from them", 0)

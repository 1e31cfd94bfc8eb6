"""What packs save of an update: places computed, matmul FLOPs, and seconds on the CPU.

python -m benchmarks.packing [places | flops | 270m | nano]

On the trace of `benchmarks.lengths`, scaled to each row's budget. FLOPs: Gemma 3 1B's update
(preset gemma3-1b) as traced, of one device; "cpu" stands for all devices without the attention
kernel, "tpu" for those with it, by the pairs of blocks that it goes through. Seconds: whole updates
on random weights, padded and in packs in turn, of the clock and of the CPU (all threads: on a busy
machine the steadier of the two). The baseline of all ratios is the update of padded rows.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
import tyro
from flax import nnx
from jax.sharding import Mesh
from tyro.conf import Positional

from benchmarks import lengths
from benchmarks.timing import chosen, print_row
from gemma_grpo import model, presets
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.kernels import lm_head_logps
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.planning import fit, programs
from gemma_grpo.planning.traced import matmul_flops
from gemma_grpo.training import grpo, grpo_update, packing
from gemma_grpo.training.state import init_train_state

DEVICES = 8
MASKS = "prompt_mask", "completion_mask"

ONE_B = presets.preset("gemma3-1b")
NANO = presets.preset("gemma3-nano")
M270 = presets.preset("gemma3-270m")
M270 = replace(
    M270,
    model=replace(M270.model, max_prompt_length=64),
    grpo=replace(M270.grpo, prompts_per_step=2),
)


def main(names: Positional[tuple[str, ...]] = ()) -> None:
    """Print the rows of the parts named, or of all: places, flops, 270m, nano."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    parts = {
        "places": print_places,
        "flops": print_flops,
        "270m": lambda: print_seconds("gemma3-270m", M270, pack_tokens=512, repeats=3),
        "nano": lambda: print_seconds("gemma3-nano", NANO, pack_tokens=192, repeats=20),
    }
    for print_part in chosen(names or tuple(parts), parts).values():
        print_part()


def print_flops() -> None:
    """Executed matmul FLOPs of all devices, by devices that share the batch and by pack size."""
    config = CONFIGS["gemma3-1b"]
    for num_devices in (DEVICES, 1):
        mesh = meshes.data_mesh(jax.devices()[:num_devices])
        padded_flops = None
        for tokens in (0, 1536, 3072, 4096):
            run = replace(ONE_B, grpo=replace(ONE_B.grpo, pack_tokens=tokens))
            packs = packed_trace(run, num_devices=num_devices)
            trace = update_on(packs, run, config, mesh).trace()
            loops = fit.pack_loops(packs, config, num_devices)
            flops = {
                platform: matmul_flops(trace, platform=platform, **loops)
                for platform in ("cpu", "tpu")
            }
            padded_flops = padded_flops or flops["cpu"]
            print_row(
                benchmark="packing/flops",
                model="gemma3-1b",
                dtype=ONE_B.model.dtype,
                remat=ONE_B.model.remat,
                shape=shape_of(ONE_B),
                devices_sharing=num_devices,
                pack_tokens=tokens,
                tokens=num_tokens(packs),
                places_per_token=round(num_places(packs) / num_tokens(packs), 3),
                matmul_tflops_of_a_device={name: round(n / 1e12, 2) for name, n in flops.items()},
                ratio={name: round(padded_flops / n, 2) for name, n in flops.items()},
            )


def print_places() -> None:
    """Places computed for each token over many steps, by simulation, and the host's CPU seconds for
    packing one: by pack size, then by prompts a step."""
    rng = np.random.default_rng(0)
    for tokens in (1536, 2048, 3072, 4096):
        print_places_of(rng, num_prompts=8, pack_tokens=tokens, steps=50)
    for num_prompts in (64, 512, 4096):
        print_places_of(rng, num_prompts=num_prompts, pack_tokens=3072, steps=1)


def print_places_of(
    rng: np.random.Generator, *, num_prompts: int, pack_tokens: int, steps: int
) -> None:
    """A row: eight completions a prompt, with lengths drawn as the trace's were, and prompts of 40
    to 120 tokens."""
    P, B = num_prompts, 8 * num_prompts
    S, T = ONE_B.model.max_prompt_length, ONE_B.model.max_completion_length
    plan = packing.make_packing(P, 8, pack_tokens, (S, T), DEVICES)
    places = head_rows = held = seconds = 0
    for _ in range(steps):
        drawn = rng.lognormal(np.log(269), 0.58, B)
        lengths_B = np.minimum(np.rint(drawn), min(T, pack_tokens - S)).astype(int)
        lengths_P = rng.integers(40, 121, P)
        batch = {
            "prompt_ids": np.zeros((P, S), np.int32),
            "prompt_mask": np.arange(S) >= S - lengths_P[:, None],
            "completion_ids": np.zeros((B, T), np.int32),
            "completion_mask": np.arange(T) < lengths_B[:, None],
        }
        started = time.process_time()
        packs = packing.pack(batch, plan)
        seconds += time.process_time() - started
        places += num_places(packs)
        head_rows += num_head_rows(packs, CONFIGS["gemma3-1b"].vocab_size)
        held += int(lengths_B.sum() + lengths_P.sum())
    print_row(
        benchmark="packing/places",
        dtype="int32",
        devices_sharing=DEVICES,
        shape=f"{P} x 8, {S} + {T}",
        pack_tokens=[shape.tokens for shape in plan.shapes],
        steps=steps,
        places_per_token=round(places / held, 3),
        head_rows_per_place=round(head_rows / places, 3),
        cpu_seconds_a_step=round(seconds / steps, 4),
    )


def num_places(packs: Sequence[dict[str, np.ndarray]]) -> int:
    """Places of all packs that are used, on all devices."""
    if "count" not in packs[0]:
        return packs[0]["prompt_mask"].size + packs[0]["completion_mask"].size
    return sum(int(each["count"].sum()) * each["slots"].shape[1] for each in packs)


def num_head_rows(packs: Sequence[dict[str, np.ndarray]], vocab_size: int) -> int:
    """Rows that the head computes in all packs that are used, which hold completions."""
    rows = 0
    for each in packs:
        completions = each["completion_mask"].reshape(len(each["slots"]), -1).sum(axis=1)
        sizes = lm_head_logps.sizes_of(each["slots"].shape[1], vocab_size)
        rows += np.take(sizes, np.searchsorted(sizes, completions[completions > 0])).sum()
    return int(rows)


def num_tokens(packs: Sequence[dict[str, np.ndarray]]) -> int:
    """Tokens of the batch, prompts that are run again counted again."""
    return int(sum(each[name].sum() for each in packs for name in MASKS))


def packed_trace(
    run: RunConfig, *, num_devices: int, prompt_lengths: Sequence[int] = ()
) -> tuple[dict[str, np.ndarray], ...]:
    """The trace's packs for an update of `run`; without their lengths prompts are full."""
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    batch = batch_of(run, vocab_size=512)
    if prompt_lengths:
        batch["prompt_mask"] = np.arange(S) >= S - np.array(prompt_lengths)[:, None]
    return packing.pack(batch, grpo.make_packing(run.grpo, (S, T), num_devices))


def update_on(
    packs: Sequence[dict[str, np.ndarray]], run: RunConfig, config: Gemma3Config, mesh: Mesh
) -> programs.Program:
    """The update of `run` on packs of these shapes."""
    update = programs.of_step(run, config, mesh)[-1]
    sharding = meshes.batch_sharding(mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tuple(packs)
    )
    return replace(update, arguments=(*update.arguments[:2], shapes))


def print_seconds(name: str, run: RunConfig, *, pack_tokens: int, repeats: int) -> None:
    """A row: seconds of an update on one CPU device, of padded rows and of packs."""
    config, mesh = CONFIGS[name], meshes.data_mesh(jax.devices()[:1])
    made = model.Gemma3(config, rngs=nnx.Rngs(0), lora_config=run.model.lora)
    graphdef, params = model.split(made)
    del made
    adapter, base = model.partition(params)
    trained, frozen = (adapter, base) if run.model.lora.rank else (base, {})
    trainer = grpo.make_trainer(run.grpo, graphdef, mesh, dtype=run.model.dtype, remat="none")
    batch = batch_of(run, vocab_size=config.vocab_size)
    lengths_of_run = run.model.max_prompt_length, run.model.max_completion_length
    forms = {
        form: packing.pack(
            batch, grpo.make_packing(replace(run.grpo, pack_tokens=tokens), lengths_of_run, 1)
        )
        for form, tokens in (("padded", 0), ("packed", pack_tokens))
    }
    places = {form: num_places(packs) for form, packs in forms.items()}
    forms = {form: meshes.place_rows(mesh, packs) for form, packs in forms.items()}
    state = init_train_state(trained, trainer.optimizer, mesh)
    seconds, cpu_seconds = {form: [] for form in forms}, {form: [] for form in forms}
    for repeat in range(repeats + 1):
        for form, arrays in forms.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            state, _ = jax.block_until_ready(trainer.update(state, frozen, arrays))
            if repeat:  # the first one compiles
                seconds[form].append(time.perf_counter() - started)
                cpu_seconds[form].append(time.process_time() - cpu_started)
    median = lambda each: {form: round(statistics.median(s), 3) for form, s in each.items()}
    wall, cpu = median(seconds), median(cpu_seconds)
    print_row(
        benchmark="packing/seconds",
        model=name,
        dtype=run.model.dtype,
        lora_rank=run.model.lora.rank,
        shape=shape_of(run),
        completion_tokens=int(batch["completion_mask"].sum()),
        pack_tokens=pack_tokens,
        places=places,
        repeats=repeats,
        seconds=wall,
        cpu_seconds=cpu,
        ratio=round(wall["padded"] / wall["packed"], 2),
        cpu_ratio=round(cpu["padded"] / cpu["packed"], 2),
    )


def shape_of(run: RunConfig) -> str:
    """Prompts x completions, prompt + completion budget."""
    return (
        f"{run.grpo.prompts_per_step} x {run.grpo.num_generations}, "
        f"{run.model.max_prompt_length} + {run.model.max_completion_length}"
    )


def batch_of(run: RunConfig, *, vocab_size: int) -> dict[str, np.ndarray]:
    """A padded batch of random tokens with the trace's first lengths, its prompts full."""
    rng = np.random.default_rng(0)
    S, T = run.model.max_prompt_length, run.model.max_completion_length
    P = run.grpo.prompts_per_step
    B = P * run.grpo.num_generations
    lengths_B = np.array(lengths.scaled(T)[:B])
    mask_BT = np.arange(T) < lengths_B[:, None]
    draw = lambda *shape: rng.integers(8, vocab_size, shape).astype(np.int32)
    return grpo_update.make_batch(
        draw(P, S),
        np.ones((P, S), bool),
        Rollout(draw(B, T), mask_BT, np.zeros((B, T), np.float32), lengths_B < T),
        rng.normal(size=B).astype(np.float32),
        run.grpo.loss,
    )


if __name__ == "__main__":
    tyro.cli(main)

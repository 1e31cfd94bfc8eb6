"""What packing saves of an update: executed matmul FLOPs, and wall-clock on the CPU.

python -m benchmarks.packing [flops | 270m | nano]

All on the trace of `benchmarks.lengths`, scaled to each row's budget. FLOPs: Gemma 3 1B's update
(preset gemma3-1b) as traced, of the device that does most; "cpu" stands for all devices that unpack
the rows for attention, "tpu" for the kernel, by the pairs of blocks that it goes through. The
baseline of both ratios is the padded form that unpacks. Seconds: whole updates on random weights,
padded and packed in turn, of the clock and of the CPU (all threads: on a busy machine the steadier
of the two); the baseline of `ratio` and `cpu_ratio` is the padded one of the same row.
"""

import statistics
import sys
import time
from dataclasses import replace

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import lengths
from benchmarks.timing import print_row
from gemma_grpo import model, presets
from gemma_grpo.config import RunConfig
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.model import CONFIGS, Gemma3Config
from gemma_grpo.planning import fit, programs
from gemma_grpo.planning.traced import matmul_flops
from gemma_grpo.training import grpo, grpo_update, packing
from gemma_grpo.training.state import init_train_state

DEVICES = 8

ONE_B = presets.preset("gemma3-1b")
NANO = presets.preset("gemma3-nano")
M270 = presets.preset("gemma3-270m")
M270 = replace(
    M270,
    model=replace(M270.model, max_prompt_length=64),
    grpo=replace(M270.grpo, prompts_per_step=2),
)


def main() -> None:
    """Print the rows of the parts named, or of all."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    parts = {
        "flops": print_flops,
        "270m": lambda: print_seconds("gemma3-270m", M270, repeats=3),
        "nano": lambda: print_seconds("gemma3-nano", NANO, repeats=20),
    }
    for name in sys.argv[1:] or parts:
        parts[name]()


def print_flops() -> None:
    """Executed matmul FLOPs of a device, by devices that share the batch and by sizes."""
    config = CONFIGS["gemma3-1b"]
    for num_devices in (DEVICES, 1):
        mesh = meshes.data_mesh(jax.devices()[:num_devices])
        padded_flops = None
        for sizes in (1, 8, 16, 32):
            packed = packed_trace(ONE_B, num_devices=num_devices, sizes=sizes)
            trace = update_on(packed, ONE_B, config, mesh).trace()
            steps = max(pairs_of_devices(packed, config, num_devices))
            flops = {
                platform: matmul_flops(trace, platform=platform, steps=steps)
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
                packed_sizes=sizes,
                completion_tokens=int(packed["completion_mask"].sum()),
                slots_of_a_device=packed.get("slots", packed["weights"]).size // num_devices,
                pairs_of_blocks_a_layer=round(steps, 2),
                matmul_tflops_of_a_device={name: round(n / 1e12, 2) for name, n in flops.items()},
                ratio={name: round(padded_flops / n, 2) for name, n in flops.items()},
            )


def packed_trace(run: RunConfig, *, num_devices: int, sizes: int) -> dict[str, np.ndarray]:
    """The trace's batch for an update of `run`, packed to one of `sizes`; 1 packs nothing."""
    return packing.pack(
        batch_of(run, vocab_size=512),
        num_devices=num_devices,
        passes=run.grpo.accumulation_steps,
        sizes=sizes,
    )


def update_on(
    batch: dict[str, np.ndarray], run: RunConfig, config: Gemma3Config, mesh: Mesh
) -> programs.Program:
    """The update of `run` on a batch of these shapes."""
    update = programs.of_step(run, config, mesh)[-1]
    shapes = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=meshes.batch_sharding(mesh))
        for name, array in batch.items()
    }
    return replace(update, arguments=(*update.arguments[:2], shapes))


def pairs_of_devices(
    batch: dict[str, np.ndarray], config: Gemma3Config, num_devices: int
) -> list[float]:
    """Pairs of blocks of attention in a layer on average, of each device."""
    (P, S), (B, T) = batch["prompt_ids"].shape, batch["completion_mask"].shape
    rows = B // num_devices, T
    flat = batch["completion_mask"].reshape(num_devices, -1)
    padded = np.where(flat, np.arange(flat.shape[1]), flat.shape[1])
    return [
        fit.mean_pairs(
            config,
            slots_X,
            rows=rows,
            num_prompts=P // num_devices,
            prompt_length=S,
        )
        for slots_X in batch.get("slots", padded).reshape(num_devices, -1)
    ]


def print_seconds(name: str, run: RunConfig, *, repeats: int) -> None:
    """A row: seconds of an update on one CPU device, padded and packed to 16 sizes."""
    config, mesh = CONFIGS[name], meshes.data_mesh(jax.devices()[:1])
    made = model.Gemma3(config, rngs=nnx.Rngs(0), lora_config=run.model.lora)
    graphdef, params = model.split(made)
    del made
    adapter, base = model.partition(params)
    trained, frozen = (adapter, base) if run.model.lora.rank else (base, {})
    trainer = grpo.make_trainer(run.grpo, graphdef, mesh, dtype=run.model.dtype, remat="none")
    batch = batch_of(run, vocab_size=config.vocab_size)
    forms = {
        "padded": batch,
        "packed": packing.pack(batch, num_devices=1, passes=1, sizes=16),
    }
    forms = {form: meshes.place_rows(mesh, arrays) for form, arrays in forms.items()}
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
        slots={form: arrays.get("slots", arrays["weights"]).size for form, arrays in forms.items()},
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
        grpo_update.Buckets(run.grpo.prompt_bucket, run.grpo.length_bucket),
    )


if __name__ == "__main__":
    main()

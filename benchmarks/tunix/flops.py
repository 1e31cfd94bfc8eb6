"""Matmul FLOPs of one GRPO step, both sides, counted in the programs as traced.

python -m benchmarks.tunix.flops [--cases "full lengths"]
needs the environment of `python -m benchmarks.tunix.install`

8 prompts x 8, 512 + 800 tokens, beta 0, mu 1, all weights trained; sums over all chips, ours as
written for TPUs. Parts: the rollout (prefill and decode loop) and the update. Lengths are those of
`benchmarks.lengths`:

    a loop goes on until the longest of its rows has ended. With us a chip of the data layout has a
    loop of its own; the tensor_parallel layout, one chip, and Tunix have one for all rows. Tunix
    can take its rollout some prompts at a time (rollout_micro_batch_size), one loop after another.
    our update is packed as the pipeline packs it. Tunix's takes every completion at its whole
    budget, to which it pads them. Its option to pack sequences, max_seq_token_per_tpu, fails with
    its Gemma 3 in 0.1.7: packing leaves out the attention mask, and the model takes no segments
    ("TypeError: ones_like requires ndarray or scalar arguments, got <class 'NoneType'>").

A case without remat is what each side has to compute once. In one pass on a v5e:2x4 neither side's
64 sequences fit without it; the cases with it have what fits there (`benchmarks.tunix.v5e`), which
recomputes least: dots of ours, packed, and DECODER of Tunix.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import tyro

from benchmarks import lengths, packing
from benchmarks.tunix import install
from benchmarks.tunix.sides import SideProcess, start_theirs
from gemma_grpo import model as gemma3
from gemma_grpo import presets
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.planning import batches, fit, programs
from gemma_grpo.planning.traced import matmul_flops

CHIPS = 8
_RUN = presets.preset("gemma3-1b")
_T = _RUN.model.max_completion_length


@dataclass(frozen=True)
class Case:
    """What is counted.

    Attributes:
        full: every completion takes its whole budget; else they have the trace's lengths.
        chips, layout, remat: of ours.
        tunix_remat: NONE, or DECODER (remat_config).
        tunix_prompts: that a rollout of Tunix's takes at a time.
    """

    full: bool = False
    chips: int = CHIPS
    layout: str = "data"
    remat: str = "none"
    tunix_remat: str = "NONE"
    tunix_prompts: int = lengths.PROMPTS


_REMAT = {"remat": "dots", "tunix_remat": "DECODER"}
CASES = {
    "full lengths": Case(full=True, chips=1),
    "on one chip": Case(chips=1),
    "on 8 chips": Case(),
    "on 8 chips, tensor_parallel": Case(layout="tensor_parallel"),
    "on 8 chips, Tunix a prompt a rollout": Case(tunix_prompts=1),
    "on 8 chips, remat": Case(**_REMAT),
    "on 8 chips, tensor_parallel, remat": Case(layout="tensor_parallel", **_REMAT),
}


def main(
    cases: tuple[str, ...] = tuple(CASES),
    model: str = "gemma3-1b",
    environment: Path | None = None,
) -> None:
    """Count, and print a row for each case and part.

    Args:
        cases: which, by name.
        model: architecture.
        environment: folder of Tunix's environment.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", CHIPS)
    config = gemma3.CONFIGS[model]
    with tempfile.TemporaryDirectory() as name:
        side = start_theirs(
            environment or install.default_folder(),
            folder=Path(name),
            script="programs.py",
        )
        flops = functools.cache(functools.partial(ask, side, config))
        for label in cases:
            case = CASES[label]
            ours, others = count_ours(case, config), count_theirs(case, flops)
            parts = {part: (ours[part], others[part]) for part in ours}
            parts["step"] = tuple(map(sum, zip(*parts.values(), strict=True)))
            for part, (own, other) in parts.items():
                row = {"benchmark": "tunix/flops", "model": model, "case": label, "part": part}
                row |= {"sequences": len(lengths.LENGTHS), "budget": _T}
                row |= {"prompt_length": _RUN.model.max_prompt_length} | dataclasses.asdict(case)
                row |= {"ours": own, "tunix": other, "ratio": round(other / own, 2)}
                print(json.dumps(row), flush=True)
        side.close()


def lengths_of(case: Case) -> tuple[int, ...]:
    """Tokens of each completion, groups one after another."""
    return (_T,) * len(lengths.LENGTHS) if case.full else lengths.scaled(_T)


def longest(each: tuple[int, ...], loops: int) -> list[int]:
    """The longest of each loop's completions, neighbours in one loop."""
    rows = len(each) // loops
    return [max(each[loop * rows : (loop + 1) * rows]) for loop in range(loops)]


def count_ours(case: Case, config: gemma3.Gemma3Config) -> dict[str, int]:
    """Operations of our rollout and update on all chips."""
    settings = replace(_RUN.model, remat=case.remat, rollout_layout=case.layout)
    run = replace(_RUN, model=settings)
    mesh = meshes.data_mesh(jax.devices()[: case.chips])
    rollout = programs.of_step(run, config, mesh)[0].trace()
    turns = longest(lengths_of(case), case.chips)
    if case.layout == "tensor_parallel":  # all chips take part in every row
        turns = [max(turns)] * case.chips
    if case.full:
        packs = batches.packs(run, "grpo", case.chips)
    else:
        packs = packing.packed_trace(run, num_devices=case.chips)
    update = packing.update_on(packs, run, config, mesh).trace()
    loops = fit.pack_loops(packs, config, case.chips)
    count = functools.partial(matmul_flops, platform="tpu")
    return {
        "rollout": sum(count(rollout, turns=chip) for chip in turns),
        "update": case.chips * count(update, **loops),
    }


def count_theirs(case: Case, flops: Callable[[str, int, str], int]) -> dict[str, int]:
    """Operations of Tunix's rollout and update, whatever the chips; `flops` is `ask`."""
    each = lengths_of(case)
    loops = lengths.PROMPTS // case.tunix_prompts
    rows = len(each) // loops
    prefill, turn = flops("prefill", rows, "NONE"), flops("decode", rows, "NONE")
    return {
        "rollout": sum(prefill + decode_turns(most) * turn for most in longest(each, loops)),
        "update": flops("train", len(each), case.tunix_remat),
    }


def ask(
    side: SideProcess, config: gemma3.Gemma3Config, program: str, sequences: int, remat: str
) -> int:
    """Operations of one of Tunix's programs, the decode loop for one turn."""
    return side.call(
        "flops",
        program=program,
        turns=1,
        shape=dataclasses.asdict(config),
        dtype=_RUN.model.dtype,
        remat=remat,
        sequences=sequences,
        prompt_length=_RUN.model.max_prompt_length,
        budget=_T,
        fsdp=1,
        tp=1,
        replicated=False,
        topology="cpu",
    )["flops"]


def decode_turns(most: int) -> int:
    """Turns of Tunix's decode loop: its prefill draws the first token, and a loop that runs into
    the budget draws one that nobody sees."""
    return most - 1 if most < _T else most


if __name__ == "__main__":
    tyro.cli(main)

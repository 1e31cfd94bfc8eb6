"""What is compared with Tunix, and what the lines of the table in docs/tunix.md are made of.

    COMPILED  programs of a side, for `v5e`
    SEARCHED  those whose batch `largest` makes larger
    COUNTED   steps of both sides, for `flops`
    FIGURES   of rows, and how `table` calls them

The sizes of `cpu`, `gpu` and `learn` are their options.
"""

from dataclasses import dataclass

from benchmarks import lengths
from gemma_grpo import presets

MODEL, TOPOLOGY, CHIPS = "gemma3-1b", "v5e:2x4", 8
RUN = presets.preset(MODEL)
S, T = RUN.model.max_prompt_length, RUN.model.max_completion_length


@dataclass(frozen=True)
class Program:
    """A program of one side: "decode" (with us the prefill too), Tunix's "prefill", "logps" without
    gradient, or "update".

    Attributes:
        sequences: all rows, on all chips.
        remat: of ours none, dots or full; of Tunix NONE, BLOCK or DECODER.
        layout, pack_tokens: of ours; 0 takes all padded rows at once, as Tunix does.
        fsdp, tp, replicated: of Tunix's mesh; `replicated` has the weights on all chips.
    """

    side: str
    program: str
    remat: str
    sequences: int = 64
    layout: str = "data"
    pack_tokens: int = RUN.grpo.pack_tokens
    fsdp: int = CHIPS
    tp: int = 1
    replicated: bool = False


COMPILED = {
    "ours-decode": Program("ours", "decode", "none", layout="tensor_parallel"),
    "ours-decode-data": Program("ours", "decode", "none"),
    "ours-logps": Program("ours", "logps", "none"),
    "ours-update": Program("ours", "update", "full", pack_tokens=0),
    "ours-update-dots": Program("ours", "update", "dots"),
    "ours-update-packed": Program("ours", "update", "full"),  # as the preset has it
    "ours-update-packed-kept": Program("ours", "update", "none"),
    "tunix-decode-default": Program("tunix", "decode", "NONE", fsdp=2, tp=4),  # its 1B recipe's
    "tunix-decode-best": Program("tunix", "decode", "NONE", replicated=True),
    "tunix-prefill-best": Program("tunix", "prefill", "NONE", replicated=True),
    "tunix-logps-best": Program("tunix", "logps", "NONE"),
    "tunix-update-best": Program("tunix", "update", "DECODER"),
}

SEARCHED = {"ours-update": 64, "tunix-update-best": 32}  # sequences from one batch to the next


@dataclass(frozen=True)
class Step:
    """A GRPO step of each side, whose lengths are those of `benchmarks.lengths`.

    Attributes:
        full: every completion takes its whole budget instead.
        short_prompts: as long as GSM8K's; else prompts take their whole budget.
        chips, layout, remat: of ours.
        tunix_remat: NONE, or DECODER.
        tunix_prompts: that a rollout of Tunix's takes at a time.
    """

    full: bool = False
    short_prompts: bool = False
    chips: int = CHIPS
    layout: str = "data"
    remat: str = "none"
    tunix_remat: str = "NONE"
    tunix_prompts: int = lengths.PROMPTS


_SHORT, _TP = {"short_prompts": True}, {"layout": "tensor_parallel"}
_REMAT = {"remat": "dots", "tunix_remat": "DECODER"}  # recomputes least of what fits
COUNTED = {
    "full lengths": Step(full=True, chips=1),
    "on one chip": Step(chips=1),
    "on 8 chips": Step(),
    "on 8 chips, tensor_parallel": Step(**_TP),
    "on 8 chips, Tunix a prompt a rollout": Step(tunix_prompts=1),
    "on 8 chips, remat": Step(**_REMAT),
    "on 8 chips, tensor_parallel, remat": Step(**_TP, **_REMAT),
    "on 8 chips, short prompts": Step(**_SHORT),
    "on 8 chips, short prompts, tensor_parallel": Step(**_SHORT, **_TP),
    "on 8 chips, short prompts, remat": Step(**_SHORT, **_REMAT),
    "on 8 chips, short prompts, tensor_parallel, remat": Step(**_SHORT, **_TP, **_REMAT),
}


@dataclass(frozen=True)
class Compared:
    """A benchmark whose rows of both sides are compared.

    Attributes:
        same: in which a row of ours and one of Tunix's agree that stand against each other.
        group: of lines, filled in from the rows `own` and `other`.
        figures: line -> (key in a row, unit). `{name}` is the program with its settings. Less is
            better, but in a line that ends in "ours / Tunix" more is.
    """

    same: tuple[str, ...]
    group: str
    figures: dict[str, tuple[str, str]]


def _step_on(device: str) -> Compared:
    return Compared(
        ("model", "prompts", "generations", "prompt_length", "budget", "part"),
        "{own[model]}, {own[prompts]} x {own[generations]}, {own[prompt_length]}+{own[budget]}, "
        + device,
        {
            "{own[part]}, wall": ("wall", "s"),
            "{own[part]}, CPU time": ("cpu", "s"),
            "first {own[part]}, compilation included, CPU time": ("first_cpu", "s"),
            "{own[part]}, peak memory": ("peak", "GB"),
            "{own[part]}, peak memory of the device": ("device_peak", "GB"),
        },
    )


FIGURES = {
    "tunix/cpu": _step_on("CPU"),
    "tunix/cuda": _step_on("{own[device]}"),
    "tunix/v5e": Compared(
        ("model", "program", "sequences"),
        "{own[model]}, v5e compiler, a chip's share of {own[sequences]} sequences",
        {
            "{name}: HBM of a step": ("step_bytes", "GB"),
            "{name}: collectives of a step": ("step_collectives", ""),
            "{name}: peak": ("peak", "GB"),
            "{name}: CPU time to compile": ("compile_cpu", "s"),
        },
    ),
    "tunix/largest": Compared(
        ("model",),
        "{own[model]}, v5e compiler, eight chips",
        {
            "sequences that fit an update (remat {own[remat]}, {other[remat]}), ours / Tunix": (
                "sequences",
                "",
            ),
        },
    ),
    "tunix/flops": Compared(
        ("model", "case", "part"),
        "{own[model]}, a step of {own[sequences]} sequences, counted",
        {"matmuls of the {own[part]}, {own[case]}": ("flops", "TFLOP")},
    ),
}

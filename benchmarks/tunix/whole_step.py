"""One GRPO step, ours against Tunix's: rollout, update and their sum, in turns that alternate.
`cpu` and `gpu` start it.

Both sides hold the same weights (their logits are compared first, and the first gradient after the
first step) and run the same frozen batch (`trace.py`): P prompts x G completions, beta 0, mu 1, no
old log-probs, the same AdamW. Rollouts sample at temperature 1 to the whole budget, with no stop
token, for neither side drops a row that has ended while another goes on, and one row of the trace
takes it all; the update is then on the trace's completions at the trace's lengths. That also takes
two of Tunix's ways out of the comparison: that it leaves EOS out of the loss, and that its key is
the same every step (it is given another seed each step).

Each side is a process of its own; while one runs, the other waits. The rollout is all that happens
until completions could be scored, the update all from rewards to updated weights. (Rows before
2026-11-26 timed of Tunix's only `generate` and `update_actor`, and of its step everything.) One row
a side and part;
`first_` is of the first step, which compiles. `wall` and `cpu` (of all threads) are seconds,
medians over the rounds (`_all` has each); `peak` is the most bytes resident in the part, its
weights and optimizer included, and `device_peak` the most that a GPU has held until the part's end.
`ratio` is Tunix over ours.
"""

import json
import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.tunix import install, trace
from benchmarks.tunix.sides import SIDES, Devices, Opener, SideProcess, processor
from gemma_grpo import model
from gemma_grpo.config import RunConfig
from gemma_grpo.model import Remat
from gemma_grpo.objective.config import LossConfig
from gemma_grpo.presets import GEMMA3_NANO
from gemma_grpo.training.grpo import GRPOConfig
from gemma_grpo.training.state import OptimizerConfig

PARTS = ("rollout", "update", "step")


@dataclass(frozen=True)
class Options:
    """Sizes, and each side's settings."""

    model: str = "gemma3-nano"
    """Architecture; gemma3-nano has its own weights, others random ones."""
    rounds: int = 5
    """Timed steps of each side, after one that compiles and one that warms up."""
    dtype: str = "float32"
    """Computed in: float32 or bfloat16, in which Tunix keeps its weights and moments too; ours are
    float32."""
    rows: int = 32
    """B = P * G, at most 64."""
    generations: int = 8
    """G, of each of the B / G prompts."""
    prompt_length: int = 128
    """S, tokens."""
    budget: int = 128
    """T, tokens."""
    pack_tokens: int = 1024
    """Of our update (grpo.pack_tokens); 0 computes all padded rows at once."""
    remat: Remat = "none"
    """Of ours (model.remat)."""
    devices: int = 1
    """Devices that ours is sharded over."""
    tunix_micro_batch: int = 1
    """Prompts of a pass of Tunix's update (train_micro_batch_size)."""
    tunix_remat: str = "NONE"
    """NONE, BLOCK or DECODER (remat_config)."""
    tunix_devices: int = 1
    """Devices that Tunix is sharded over (its fsdp axis)."""
    apart: bool = False
    """Hold one side in memory at a time, where there is no room for two."""
    environment: Path = field(default_factory=install.default_folder)
    """Folder of Tunix's environment."""


def run(options: Options, *, platform: str) -> None:
    """Take both sides through GRPO steps in turn on devices of `platform`, and print."""
    made = trace.make_trace(
        vocab_size=model.CONFIGS[options.model].vocab_size,
        rows=options.rows,
        generations=options.generations,
        prompt_length=options.prompt_length,
        budget=options.budget,
    )
    with tempfile.TemporaryDirectory() as name:
        opener = Opener(run_of(options), Path(name))
        taken, agreement = take_turns(opener, options, platform, Steps(made))
    about = {
        "benchmark": f"tunix/{platform}",
        "model": options.model,
        "dtype": options.dtype,
        "device": processor() if platform == "cpu" else opener.device,
        "prompts": len(made["prompt_ids"]),
        "generations": options.generations,
        "prompt_length": options.prompt_length,
        "budget": options.budget,
        "completion_tokens": int(made["lengths"].sum()),
        "rounds": options.rounds,
        "one_side_in_memory": options.apart,
        **agreement,
    }
    for row in rows_of(taken, made["completion_ids"].size):
        side = row["side"]
        said = {"settings": settings(options)[side], "versions": opener.versions[side]}
        print(json.dumps(about | row | said), flush=True)


def run_of(options: Options) -> RunConfig:
    """The run of which both sides take steps."""
    sizes = {"max_prompt_length": options.prompt_length, "max_completion_length": options.budget}
    model = replace(
        GEMMA3_NANO.model,
        weights=options.model,
        dtype=options.dtype,
        remat=options.remat,
        **sizes,
    )
    grpo = GRPOConfig(
        num_steps=options.rounds + 2,
        prompts_per_step=options.rows // options.generations,
        num_generations=options.generations,
        pack_tokens=options.pack_tokens,
        scale="group",
        loss=LossConfig(aggregation="sequence_mean", epsilon_high=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup=0.0, decay="constant"),
        curriculum=False,
    )
    return replace(GEMMA3_NANO, model=model, grpo=grpo)


def settings(options: Options) -> dict[str, dict]:
    """What is said of each side in its rows."""
    ours = ("pack_tokens", "remat", "devices")
    return {
        "ours": {name: getattr(options, name) for name in ours},
        "tunix": {
            "train_micro_batch_size": options.tunix_micro_batch,
            "remat": options.tunix_remat,
            "devices": options.tunix_devices,
        },
    }


class Steps:
    """Steps of a side on the trace."""

    def __init__(self, made: dict):
        self.prompts, self.rewards = made["prompt_ids"].tolist(), made["rewards"].tolist()
        rows = zip(made["completion_ids"], made["lengths"], strict=True)
        self.completions = [ids[:length].tolist() for ids, length in rows]
        self.sampled = made["completion_ids"].size

    def take(self, side: SideProcess, number: int) -> dict[str, dict]:
        """Readings of a step's parts and of their sum."""
        drawn = side.call("draw", prompts=self.prompts, number=number, instead=self.completions)
        if drawn["drawn"] != self.sampled:
            raise SystemExit(f"{side.name} drew {drawn['drawn']} tokens, not {self.sampled}")
        rollout = drawn["reading"]
        update = side.call("learn", rewards=self.rewards)["reading"]
        whole = {key: rollout[key] + update[key] for key in ("wall", "cpu")}
        return {"rollout": rollout, "update": update, "step": whole}


Taken = dict[str, list[dict]]


def take_turns(
    opener: Opener, options: Options, platform: str, steps: Steps
) -> tuple[Taken, dict[str, float]]:
    """The steps of each side, the first of which compiles and is not counted, and how far apart the
    two are.

    Both sides are in memory, take a step that compiles and one to warm up, and then A B A B ...;
    or, `apart`, one side is at a time: in each round each starts anew, compiles (after the first
    round from a cache), and takes one step that counts.
    """
    devices = Devices(platform, options.devices), Devices(platform, options.tunix_devices)
    remat, micro_batch = options.tunix_remat, options.tunix_micro_batch
    opened = {
        "ours": lambda: opener.ours(devices[0]),
        "tunix": lambda: opener.theirs(
            options.environment, devices[1], micro_batch=micro_batch, remat=remat
        ),
    }
    taken: Taken = {name: [] for name in SIDES}
    agreement: dict[str, float] = {}
    sides: dict[str, SideProcess] = {}
    for number in range(options.rounds if options.apart else options.rounds + 2):
        for name in SIDES:
            if options.apart or number == 0:
                sides[name] = opened[name]()
                first = steps.take(sides[name], 0)
                if number == 0:
                    taken[name].append(first)
                    sides[name].call("moment", out=opener.file(f"{name}-moment.npy"))
            if options.apart or number:
                taken[name].append(steps.take(sides[name], 1 if options.apart else number))
            if options.apart:
                sides[name].close()
        agreement = agreement or {
            "logits_apart": opener.logits_apart(),
            "gradient_apart": opener.gradients_apart(),
        }
    if options.apart:
        return taken, agreement
    for side in sides.values():
        side.close()
    return {name: [first, *rest] for name, (first, _, *rest) in taken.items()}, agreement


def rows_of(taken: Taken, sampled: int) -> list[dict]:
    """The table: a row a part and side; `sampled` tokens are drawn in a rollout."""
    rows = []
    for part in PARTS:
        read = lambda key, part=part: {
            name: [step[part][key] for step in steps] for name, steps in taken.items()
        }
        all_seconds = {key: read(key) for key in ("wall", "cpu")}
        for name, (first, *counted) in taken.items():
            row = {"side": name, "part": part}
            for key, seconds in all_seconds.items():
                median = {side: statistics.median(each[1:]) for side, each in seconds.items()}
                row[key] = round(median[name], 4)
                row[f"{key}_all"] = [round(one, 4) for one in seconds[name][1:]]
                ratio = "ratio" if key == "wall" else "cpu_ratio"
                row[ratio] = round(median["tunix"] / median[name], 2)
                row[f"first_{key}"] = round(first[part][key], 2)
            if part == "rollout":
                row["tokens_per_s"] = round(sampled / row["wall"], 1)
            for key in ("peak", "device_peak"):
                if counted[0][part].get(key):
                    row[key] = max(step[part][key] for step in counted)
            rows.append(row)
    return rows

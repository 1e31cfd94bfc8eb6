"""Which problems each step of GRPO draws: from the seed, the step and the groups on record."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from gemma_grpo.data import batches, pass_rates
from gemma_grpo.data.pass_rates import Group, Kind, PassRates
from gemma_grpo.data.problem import Problem
from gemma_grpo.devices import processes
from gemma_grpo.records import read
from gemma_grpo.training.config import GRPOConfig

_ROUND = 1_000_003  # added to the seed for each further sampling round


@dataclass
class History:
    """The pass rates of all steps so far: this process's own and, before them, those in rollouts/.

    Draws thus depend on the record alone, and a resumed run draws the same.
    """

    run_dir: Path
    rates: PassRates = field(default_factory=PassRates)
    num_steps: int = 0

    def until(self, step: int) -> PassRates:
        """The pass rates over the groups of the first `step` steps."""
        if self.num_steps != step:
            record = processes.broadcast_from_primary(lambda: on_record(self.run_dir, step))
            self.rates, self.num_steps = PassRates(), step
            for groups in record:
                self.rates.add(groups)
        return self.rates

    def add(self, problems_P: Sequence[Problem], correctness_B: Sequence[float]) -> None:
        """Adds the groups of the next step, given the correctness of their completions."""
        right_PG = np.reshape(correctness_B, (len(problems_P), -1)) > 0
        self.rates.add(
            Group(problem.prompt, pass_rates.kind_of(problem), int(row.sum()), len(row))
            for problem, row in zip(problems_P, right_PG, strict=True)
        )
        self.num_steps += 1


def on_record(run_dir: Path, num_steps: int) -> list[list[Group]]:
    """The groups of each of the first steps, from rollouts/; none, and a warning, for a step whose
    file is gone."""
    files = read.rollout_steps(run_dir)
    rows_of = lambda step: read.json_lines(files[step])[0] if step in files else []
    record = [_from_rows(rows_of(step)) for step in range(1, num_steps + 1)]
    if missing := sum(not groups for groups in record):
        print(
            f"warning: {run_dir}/rollouts lacks {missing} of {num_steps} steps: their pass rates "
            "are not known, and other problems may be drawn than before",
            file=sys.stderr,
        )
    return record


def _from_rows(rows: list[dict]) -> list[Group]:
    """The groups of one step's rows of rollouts/."""
    by_group: dict[int, list[dict]] = {}
    for row in rows:
        by_group.setdefault(row.get("group", 0), []).append(row)
    return [
        Group(
            str(of_group[0].get("prompt")),
            Kind(str(of_group[0].get("difficulty")), str(of_group[0].get("domain"))),
            sum(map(read.is_right, of_group)),
            len(of_group),
        )
        for of_group in by_group.values()
    ]


@dataclass(frozen=True)
class Draws:
    """Draws the problems of a step's sampling rounds.

    Attributes:
        problems: by difficulty.
        history: read only if `skip_uniform` or the curriculum needs it.
    """

    config: GRPOConfig
    problems: dict[str, list[Problem]]
    seed: int
    history: History

    def batch(self, step: int, sampling_round: int = 0) -> list[Problem]:
        """problems_P of one sampling round: a function of (seed, step, round) and the history."""
        drawn_P = self._before_skipping(step, sampling_round)
        if not self.config.skip_uniform:
            return drawn_P
        return pass_rates.pass_over(
            drawn_P,
            self.problems,
            self.history.until(step),
            self.config.skip_uniform,
            batches.generator(self._seed(sampling_round), batches.SKIP_STREAM, step),
        )

    def num_skipped(self, step: int) -> int:
        """How many problems of the first round `skip_uniform` replaced."""
        if not self.config.skip_uniform:
            return 0
        pairs = zip(self._before_skipping(step, 0), self.batch(step), strict=True)
        return sum(drawn is not taken for drawn, taken in pairs)

    def _before_skipping(self, step: int, sampling_round: int) -> list[Problem]:
        config, seed = self.config, self._seed(sampling_round)
        size = config.prompts_per_step
        if config.curriculum == "phases":
            return batches.phase_batch(
                self.problems, step=step, num_steps=config.num_steps, batch_size=size, seed=seed
            )
        if config.curriculum == "pass_rate":
            weights_N = self.history.until(step).weights(self._all)
            rng = batches.generator(seed, batches.PASS_RATE_STREAM, step)
            return pass_rates.weighted_batch(self._all, weights_N, size, rng)
        rows = batches.batch_indices(step, size, len(self._all), seed)
        return [self._all[row] for row in rows]

    @cached_property
    def _all(self) -> list[Problem]:
        """The problems of all difficulties, in one list."""
        return sum(self.problems.values(), [])

    def _seed(self, sampling_round: int) -> int:
        return self.seed + _ROUND * sampling_round


def warning(config: GRPOConfig, problems: Sequence[Problem]) -> str | None:
    """A warning if `skip_uniform` can do little because most problems are drawn once."""
    drawn = config.num_steps * config.prompts_per_step
    if not config.skip_uniform or drawn >= len(problems):
        return None
    return (
        f"grpo.skip_uniform: {config.num_steps} steps draw {drawn} of {len(problems)} problems: "
        "few come up twice, and only those can be passed over"
    )

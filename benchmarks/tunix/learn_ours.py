"""Our side of a learning curve: `ours`' step in two halves, rewards from outside in between.

python -m benchmarks.tunix.learn_ours, started by the benchmark.
"""

from pathlib import Path

import jax
import numpy as np

from benchmarks.tunix import ours
from benchmarks.tunix.theirs import turns
from benchmarks.tunix.trace import PAD
from gemma_grpo import config, weights
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.text import padding


class Learner(ours.Side):
    """The calls that the benchmark makes, beside those of `ours`."""

    def begin(self, run: str, stop_ids: list[int], trained_stop: bool) -> dict:
        """The GRPO stage of a run's config.yaml, ready for its first step; without `trained_stop`
        completions go into the update without the token that ended them, as Tunix's do."""
        self.run, self.stop_ids = config.from_yaml(Path(run)), stop_ids
        self.trained_stop = trained_stop
        settings = self.run.model
        self._open(
            self.run.grpo,
            budget=settings.max_completion_length,
            stop_ids=tuple(stop_ids),
            dtype=settings.dtype,
            remat=settings.remat,
        )
        return {}

    def draw(self, prompts: list[list[int]], number: int) -> dict:
        """Step `number`'s rollout: completions without their stop token, and whether each had one.

        The key is that of our own training.
        """
        with turns.measured() as reading:
            self.prompts, self.mask = padding.pad_left(
                prompts, length=self.run.model.max_prompt_length, pad_id=PAD
            )
            key = jax.random.fold_in(jax.random.key(self.run.seed), number)
            self.drawn = self._draw(self.prompts, self.mask, jax.random.fold_in(key, 0))
            kept = self._without_stop(self.drawn).completion_mask
            rows = zip(self.drawn.completion_ids, kept, strict=True)
            completions = [ids[mask].tolist() for ids, mask in rows]
        return {
            "completions": completions,
            "stopped": self.drawn.stopped.tolist(),
            "reading": reading,
        }

    def learn(self, rewards: list[float]) -> dict:
        """The same step's update."""
        with turns.measured() as reading:
            drawn = self.drawn if self.trained_stop else self._without_stop(self.drawn)
            self._update(self.prompts, self.mask, drawn, np.array(rewards))
        return {"reading": reading}

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        weights.save(Path(out), self.state.params)
        return {}

    def _without_stop(self, drawn: Rollout) -> Rollout:
        is_stop_BT = np.isin(drawn.completion_ids, self.stop_ids)
        return drawn._replace(completion_mask=drawn.completion_mask & ~is_stop_BT)


if __name__ == "__main__":
    side = Learner()
    turns.serve(
        {name: getattr(side, name) for name in ("load", "logits", "begin", "draw", "learn", "save")}
    )

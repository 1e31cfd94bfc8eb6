"""Tunix's side of a learning curve: `worker`'s learner, paid from outside. Run by its own Python.

Its reward function hands the completions out and waits for what they are paid. Tunix trains on what
it drew, unless it is given other completions instead.
"""

import dataclasses
import queue

import jax.numpy as jnp
import numpy as np
import turns
import worker
from flax import nnx


class Learner(worker.Side):
    """The calls that the benchmark makes, beside those of `worker`."""

    def begin(
        self,
        num_prompts: int,
        generations: int,
        prompt_length: int,
        budget: int,
        micro_batch: int,
        learning_rates: list[float],
        stop_ids: list[int],
        first_seed: int,
    ) -> dict:
        """The learner, ready for its first step; a learning rate and a seed for each."""
        self.budget, self.first_seed, self.paid = budget, first_seed, queue.Queue()
        rates = jnp.array(learning_rates)
        self._open(
            num_prompts=num_prompts,
            generations=generations,
            prompt_length=prompt_length,
            budget=budget,
            micro_batch=micro_batch,
            learning_rate=lambda count: rates[count],
            eos_tokens=stop_ids,
        )
        return {}

    def draw(
        self, prompts: list[list[int]], number: int, instead: list[list[int]] | None = None
    ) -> dict:
        """Step `number`'s rollout: completions without their stop token, and whether each had
        one; or those given instead."""
        self.instead = instead
        self.rollout_config.seed = self.first_seed + number
        with turns.measured() as reading:
            texts = [" ".join(map(str, ids)) for ids in prompts]
            self.requests.put({"prompts": np.array(texts)})
            completions = [[int(word) for word in text.split()] for text in self._outcome()]
        return {
            "completions": completions,
            # Cut before the token that ended it, a completion is shorter than the budget.
            "stopped": [len(ids) < self.budget for ids in completions],
            "reading": reading,
        }

    def learn(self, rewards: list[float]) -> dict:
        """The same step's update."""
        with turns.measured() as reading:
            self.paid.put(rewards)
            self._outcome()
        return {"reading": reading}

    def save(self, out: str) -> dict:
        """The weights, to a file."""
        state = nnx.to_flat_state(nnx.state(self.cluster.actor_trainer.model, nnx.Param))
        np.savez(out, **{"/".join(map(str, path)): leaf.get_value() for path, leaf in state})
        return {}

    def _reward(self, prompts: list[str], completions: list[str], **_: object) -> list[float]:
        self.ended.put(completions)
        return self.paid.get()

    def _generate(self, generate):
        def run(*args, **kwargs):
            output = generate(*args, **kwargs)
            if self.instead is None:
                return output
            texts = [" ".join(map(str, ids)) for ids in self.instead]
            tokens = [np.array(ids, np.int32) for ids in self.instead]
            return dataclasses.replace(output, tokens=tokens, text=texts)

        return run

    def _update(self, update):
        return update


if __name__ == "__main__":
    side = Learner()
    turns.serve(
        {name: getattr(side, name) for name in ("load", "logits", "begin", "draw", "learn", "save")}
    )

"""Rewards: one completion in, one float per component out. Does not import jax.

A reward is any `Callable[[Sample], float]`. Five are built in, each in [0, 1]:

    correctness  the answer block says what the gold answer says              weight 0.40->0.60
    trace        true steps on this problem's numbers that lead to the answer  weight 0.45->0.25
    confidence   a proper score of the sampler's probability of its answer    weight 0.15
    verbosity    tokens used beyond a free share of the budget (a penalty)    weight -0.05
    format       well formed and ended on its own stop token                  weight 0.10

The total is the weighted sum. Weights anneal linearly over the run, from paying for the trace to
paying for the answer. Text outside the tags, or no end, costs the format's weight.

Completions are text from a policy that is paid to find holes, so every reading here is strict: what
can be read in two ways pays nothing.
"""

from gemma_grpo.rewards.components import (
    COMPONENTS,
    FREE_SHARE,
    STEPS_NEEDED,
    confidence,
    correctness,
    format_ok,
    reasoning_steps,
    structure,
    trace,
    verbosity,
)
from gemma_grpo.rewards.custom import GivenRewards, load_extra_rewards, load_reward
from gemma_grpo.rewards.sample import BatchReward, Reward, Sample, batch_reward
from gemma_grpo.rewards.scores import Scores, TolerantReward, score
from gemma_grpo.rewards.weights import (
    END_WEIGHTS,
    START_WEIGHTS,
    RewardConfig,
    RewardWeights,
    RubricConfig,
    weights_at,
)

__all__ = [
    "BatchReward",
    "COMPONENTS",
    "END_WEIGHTS",
    "FREE_SHARE",
    "GivenRewards",
    "Reward",
    "RewardConfig",
    "RewardWeights",
    "RubricConfig",
    "STEPS_NEEDED",
    "START_WEIGHTS",
    "Sample",
    "Scores",
    "TolerantReward",
    "batch_reward",
    "confidence",
    "correctness",
    "format_ok",
    "load_extra_rewards",
    "load_reward",
    "reasoning_steps",
    "score",
    "structure",
    "trace",
    "verbosity",
    "weights_at",
]

"""What each metric of metrics.jsonl means, what is healthy, and what to do when it is not.

One table for docs/metrics.md (`python -m benchmarks.metrics_page`), for the lines that `train` says
(`watch.py`), for limits of the guard (`training.config`), and for whoever shows a metric. Does not
import jax.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Note:
    """On one metric.

    Attributes:
        meaning: a sentence, with its unit.
        healthy: in words.
        fix: what to do where it is not healthy; "" if it only informs.
        low, high: the range that a mean over `watch.WINDOW` steps keeps, both ends in it; None
            where that side is open.
    """

    meaning: str
    healthy: str
    fix: str = ""
    low: float | None = None
    high: float | None = None


NOTES = {
    "loss": Note(
        "What is minimised: in SFT, nats per completion token; in GRPO, minus the advantage, "
        "weighted by token.",
        "SFT: falls. GRPO: about 0. Loss about 0 is expected on-policy: the ratio is 1 and the "
        "advantages of a group sum to 0; the model learns from its gradient",
        "Look at reward/correctness and grad_norm instead; nan or inf stops the run.",
    ),
    "policy_loss": Note(
        "The loss without its KL terms, before grpo.loss.policy-weight.",
        "about 0, as the loss",
        "As for the loss.",
    ),
    "kl_loss": Note(
        "The KL term as it goes into the loss, before beta; logged with grpo.loss.beta above 0.",
        "small and slowly rising, as kl",
        "As for kl.",
    ),
    "kl": Note(
        "Divergence from the model that GRPO began with (k3 estimator), nats per token; logged "
        "with grpo.loss.beta above 0.",
        "0 at first, then slowly rising; at most 0.3",
        "Lower grpo.optimizer.learning-rate or raise grpo.loss.beta: the policy has left what SFT "
        "taught.",
        high=0.3,
    ),
    "teacher_kl_loss": Note(
        "The KL to the teacher as it goes into the loss, before grpo.loss.distill-weight; logged "
        "with a grpo.teacher.",
        "falls, as teacher_kl",
        "As for teacher_kl.",
    ),
    "teacher_kl": Note(
        "Divergence from the teacher (k3 estimator), nats per token; logged with a grpo.teacher.",
        "falls and levels off; at 0 the student is the teacher",
        "If it rises, lower grpo.optimizer.learning-rate; if it stays high, the student is too "
        "small, or writes completions that are unfamiliar to the teacher: train SFT longer first.",
    ),
    "clip_fraction": Note(
        "Share of tokens whose ratio was clipped; 0 with one update per rollout.",
        "0 with num_iterations 1; else at most 0.2",
        "Lower grpo.optimizer.learning-rate or grpo.num-iterations: later updates learn from "
        "tokens that the policy would no longer write.",
        high=0.2,
    ),
    "tis_weight": Note(
        "Mean weight that truncated importance sampling gives a token; logged when it is on.",
        "about 1",
        "As for logp_gap/mean.",
        low=0.8,
        high=1.2,
    ),
    "tis_capped_fraction": Note(
        "Share of tokens whose importance weight reached its cap.",
        "at most 0.05",
        "As for logp_gap/mean.",
        high=0.05,
    ),
    "entropy": Note(
        "How undecided the sampler is, nats per token.",
        "falls, and levels off above 0.005; at most 3",
        "Low: the completions of a group have become copies; lower grpo.optimizer.learning-rate, "
        "or raise grpo.loss.epsilon-high or grpo.temperature. High: the policy falls apart; "
        "lower grpo.optimizer.learning-rate.",
        low=0.005,
        high=3.0,
    ),
    "logp_gap/mean": Note(
        "Mean absolute difference between the trainer's and the sampler's log-probs of the same "
        "tokens, nats: only numerical error.",
        "1e-6 in float32 on a CPU, about 0.01 in bfloat16; at most 0.05",
        "Sampler and trainer disagree: run verify_kernels, set grpo.loss.tis-cap, or on a CPU use "
        "model.dtype float32.",
        high=0.05,
    ),
    "logp_gap/rms": Note(
        "The same as a root mean square: single tokens that are far off show up here first.",
        "a few times logp_gap/mean",
        "As for logp_gap/mean.",
    ),
    "grad_norm": Note(
        "Global norm of the gradient, before it is clipped to optimizer.max_grad_norm.",
        "falls in SFT; in GRPO steady, and 0 in a step without signal",
        "If it grows over many steps, lower the learning rate; if it stays 0, look at "
        "zero_signal_groups.",
    ),
    "learning_rate": Note(
        "Learning rate of the step's last update.",
        "above 0",
        "Nothing is learned: raise optimizer.learning-rate or optimizer.final-rate.",
    ),
    "reward/mean": Note(
        "Mean weighted reward of the step's completions.",
        "rises together with reward/correctness",
        "If it rises while reward/correctness is flat, a component may be earned without the "
        "answer: read the rollouts with the highest reward, and try another reward on them with "
        "`python -m gemma_grpo.rescore RUN`.",
    ),
    "reward/std": Note(
        "Standard deviation of the reward within a group, mean over groups.",
        "above 0; falls as groups agree",
        "At 0 every group's rewards are equal, so there is no gradient. A component must differ "
        "within a group to teach: look at your own rewards, all_wrong_groups and "
        "all_right_groups.",
        low=1e-6,
    ),
    "reward/correctness": Note(
        "Share of the sampled completions whose answer is right (temperature sampling, training "
        "problems).",
        "rises; by phases it drops where harder problems begin",
        "Flat at 0: see all_wrong_groups. Flat above 0: more steps, or a higher learning rate.",
    ),
    "reward/trace": Note(
        "How much of the required work is shown and true, 0 to 1.",
        "rises, or stays high",
        "If it falls while accuracy rises, raise its weight.",
    ),
    "reward/confidence": Note(
        "Score of the sampler's own probability of its answer, 0 to 1.",
        "at or above reward/correctness",
        "Far below it, the model is sure of wrong answers.",
    ),
    "reward/verbosity": Note(
        "Penalty for length, 0 to 1; its weight is negative.",
        "below 0.5",
        "As for truncated.",
    ),
    "reward/format": Note(
        "Share of completions that are well formed and end by themselves.",
        "above 0.9 after SFT; at least 0.5",
        "More SFT steps: GRPO learns slowly what is seldom sampled. If it falls, lower "
        "grpo.optimizer.learning-rate.",
        low=0.5,
    ),
    "reward/*": Note(
        "Mean unweighted value of a reward of your own.",
        "rises, if it can",
        "If it stays flat, it may be the same for all completions of a group, and then it teaches "
        "nothing.",
    ),
    "missing/*": Note(
        "Completions of the step that a reward of your own failed on, or that a judge gave no "
        "verdict on; they are paid without it.",
        "0",
        "A line on stderr says why.",
    ),
    "weight/*": Note(
        "Weight of a component at this step.",
        "changes linearly from reward.start to reward.end",
    ),
    "zero_signal_groups": Note(
        "Groups whose rewards are all equal: they give no gradient.",
        "fewer than half of prompts_per_step",
        "As for reward/std.",
    ),
    "mixed_groups": Note(
        "Groups with both right and wrong completions: they teach most.",
        "at least a third of prompts_per_step",
        "As for all_wrong_groups and all_right_groups.",
    ),
    "all_wrong_groups": Note(
        "Share of groups without a right completion.",
        "at most 0.7",
        "The problems are too hard for this model: more SFT, easier problems, a larger grpo.num- "
        "generations, grpo.curriculum pass_rate, or grpo.resample-rounds.",
        high=0.7,
    ),
    "all_right_groups": Note(
        "Share of groups without a wrong completion.",
        "at most 0.9",
        "The problems are too easy to teach anything: use harder ones, grpo.skip-uniform, or "
        "grpo.resample-rounds.",
        high=0.9,
    ),
    "resample_rounds": Note(
        "Extra rollouts that the step took to replace uniform groups.",
        "below grpo.resample-rounds",
        "Always at the limit: as for all_wrong_groups and all_right_groups.",
    ),
    "completion_length/mean": Note(
        "Tokens per completion, the stop token included.",
        "between half and twice its mean over the first steps",
        "Growing: completions are padded to earn a reward, or do not stop. Shrinking: the work is "
        "left out. Read some rollouts; change reward.end.verbosity or reward.end.trace.",
    ),
    "truncated": Note(
        "Share of completions that were cut off at model.max-completion-length.",
        "at most 0.2",
        "Raise model.max-completion-length, or pay more for ending: reward.start.format.",
        high=0.2,
    ),
    "evaluation/*": Note(
        "Of a snapshot: the same few held-out problems every evaluation.every steps, answered "
        "greedily; `accuracy` and the other figures of an evaluation.",
        "accuracy rises, with reward/correctness",
        "If reward/correctness rises and it does not, the training problems are being memorised: "
        "use more of them, or fewer steps.",
    ),
    "share/*": Note(
        "Share of the step's problems that are easy, medium, hard.",
        "follows the phase of the curriculum; by pass_rate it moves to where groups are mixed",
    ),
    "skipped_problems": Note(
        "Problems of the first sampling round that were replaced by others (grpo.skip-uniform).",
        "grows as problems are solved; each would most likely have been a uniform group",
    ),
    "phase": Note(
        "With the curriculum by phases: the difficulty that its problems favour; otherwise all.",
        "easy, medium, hard, for a third of the steps each",
    ),
    "time/step_s": Note("Seconds of the whole step.", "steady after the second step"),
    "time/rollout_s": Note("Part of it: sampling and scoring.", "steady after the second step"),
    "time/reward_s": Note(
        "Part of that: scoring, with built-in and custom rewards and judges.",
        "at most half of time/step_s",
        "Make your own reward faster: @batch_reward gets all completions of a step at once; a "
        "judge handles more calls at a time with reward.rubric.parallel.",
    ),
    "time/snapshot_s": Note("Seconds of the snapshot after the step.", "steady"),
    "tokens_per_s": Note("Completion tokens per second of the step.", "steady"),
}


def note(metric: str) -> Note | None:
    """The note on a metric; `reward/` and `weight/` of a user's own reward have a shared one."""
    return NOTES.get(metric) or NOTES.get(f"{metric.partition('/')[0]}/*")

"""Whether both sides' updates are one: GRPO steps on the same completions, paid at random.

JAX_PLATFORMS=cpu python -m benchmarks.tunix.replay [--seeds 0] [--steps 30]

The learners of `learn` go on from gemma3-nano's base weights through the whole course of learning
rates. Ours, without the stop token in its loss, draws; Tunix trains on those completions in the
place of its own, and both get the same rewards. `apart` says how far the weights are from one
another in the end, as a share of how far ours have gone (2-norms over all weights). Of each step,
`empty` counts the completions that are a stop token alone, and `moments_apart` is the largest
difference of Adam's first moments of the final norm, as a share of their largest.
"""

import tyro

from benchmarks.tunix import learn

if __name__ == "__main__":
    tyro.cli(learn.replay)

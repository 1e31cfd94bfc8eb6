"""Google's Tunix beside this library: same weights, same rows, same machine, turn by turn.

    install  makes Tunix's own environment
    cpu      rollout, update and whole GRPO step on CPU, interleaved
    gpu      the same on a GPU
    v5e      both sides through the TPU compiler for a v5e-8
    flops    matmuls of a step
    largest  the largest batch of an update that fits a v5e-8
    table    JSON lines to a Markdown table and a bar chart
    learn    learning curves: GRPO from the same weights, step by step
    curves   their summary and their chart
    replay   whether both sides' updates are the same on the same completions, step by step

`theirs/` is all that Tunix's Python gets to see of this repository.
"""

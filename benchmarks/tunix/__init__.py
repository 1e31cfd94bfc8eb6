"""Google's Tunix beside this library: same weights, same rows, same machine, turn by turn.

docs/tunix.md has the commands; what runs Tunix needs the environment that `install` makes.
Of this repository Tunix's Python gets to see `theirs/`, and the file that counts FLOPs,
`gemma_grpo/planning/traced.py`.
"""

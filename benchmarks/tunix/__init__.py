"""Google's Tunix beside this library: same weights, same rows, same machine, turn by turn.

docs/tunix.md has the commands; what runs Tunix needs the environment that `install` makes.
`theirs/` is all that Tunix's Python gets to see of this repository.
"""

"""Google's Tunix beside this library: same weights, same rows, same machine, turn by turn.

`cases` is what is compared and `sides` runs it; docs/tunix.md has the commands. `theirs/` is all
that Tunix's Python gets to see of this repository.
"""

"""Processes that tests start: what they find in their environment."""

import os

import compiling

# As a user has them, but for programs that are compiled quickly: they run a few times. The cache of
# programs is that of the session, as conftest.py names it.
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": compiling.QUICKLY}

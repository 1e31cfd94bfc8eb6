"""The compiler's clock."""

import time

import jax
import jax.numpy as jnp

from gemma_grpo.records import compile_clock


def test_the_clock_counts_compilation_and_nothing_else():
    function = jax.jit(lambda x: jnp.linalg.inv(x) @ x)
    with compile_clock.running() as clock:
        started = time.monotonic()
        function(jnp.eye(7)).block_until_ready()
        first = clock.seconds
        assert 0 < first < time.monotonic() - started
        function(jnp.eye(7)).block_until_ready()
        assert clock.seconds == first  # compiled already
        function(jnp.eye(8)).block_until_ready()
        both = clock.seconds
        assert first < both < time.monotonic() - started
        assert both > 1.2 * first  # the second program is no cheaper
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(5))
    assert clock.seconds == both  # stopped


def test_programs_that_are_compiled_at_the_same_time_count_once(monkeypatch):
    clock = compile_clock.CompileClock()
    for now, duration in ((10.0, 3.0), (11.0, 2.0), (10.5, 0.5), (20.0, 1.0)):  # 7 to 11, 19 to 20
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        clock._note("/jax/core/compile/backend_compile_duration", duration)
    assert clock.seconds == 5.0

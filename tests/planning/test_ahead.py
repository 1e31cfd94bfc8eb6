"""Programs compiled in threads: a call finds them, a fault shows where it is called, a way out."""

import threading

import jax
import numpy as np
import pytest

from gemma_grpo.planning import ahead
from gemma_grpo.planning.programs import Program

SHAPE = jax.ShapeDtypeStruct((4,), np.float32)


def program(name, function):
    return Program(name, jax.jit(function), (SHAPE,), 0, "copy")


def test_a_call_of_what_was_compiled_ahead_traces_nothing():
    traced = []
    double = program("double", lambda x: traced.append(threading.current_thread()) or 2 * x)
    with ahead.Ahead() as threads:
        threads.start([double])
        threads.wait(["double", "a program that was not started"])
        assert len(traced) == 1 and traced[0] is not threading.current_thread()
        np.testing.assert_array_equal(double.function(np.ones(4, np.float32)), 2.0)
    assert len(traced) == 1


def test_a_program_that_fails_to_compile_fails_where_it_is_called():
    def fail(x):
        raise ValueError("no such shape")

    broken = program("broken", fail)
    with ahead.Ahead() as threads:
        threads.start([broken])
        threads.wait(["broken"])
        with pytest.raises(ValueError, match="no such shape"):
            broken.function(np.ones(4, np.float32))


def test_on_leaving_what_is_compiled_is_waited_for_and_the_rest_is_dropped(monkeypatch):
    monkeypatch.setattr(ahead, "THREADS", 1)
    begun, go_on, done = threading.Event(), threading.Event(), []

    def first(x):
        begun.set()
        assert go_on.wait(60)
        done.append("first")
        return x

    with ahead.Ahead() as threads:
        threads.start([program("first", first), program("second", lambda x: done.append(2) or x)])
        assert begun.wait(60)
        threading.Timer(0.2, go_on.set).start()
    assert done == ["first"]

"""A signal is noted once, and never lost."""

import signal

import pytest

from gemma_grpo.errors import InterruptedRunError
from gemma_grpo.training.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_no_step_has_seen_is_raised_when_the_stage_is_left(number):
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError, match=number.name), Interrupt() as interrupt:
        signal.raise_signal(number)
        assert interrupt.signal_number == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "number, again", [(signal.SIGINT, "; Ctrl-C again stops unsaved"), (signal.SIGTERM, "")]
)
def test_a_signal_is_answered_at_once_by_what_follows(capsys, number, again):
    with pytest.raises(InterruptedRunError), Interrupt():
        signal.raise_signal(number)
        said = capsys.readouterr().err
        assert said == f"\nfinishing the step, then saving{again}\n"


def test_an_exception_passes_a_signal_that_was_noted():
    with pytest.raises(ValueError, match="mine"), Interrupt():
        signal.raise_signal(signal.SIGTERM)
        raise ValueError("mine")


def test_a_second_ctrl_c_goes_to_the_handler_before(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), Interrupt():
            signal.raise_signal(signal.SIGINT)
            assert not seen
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]

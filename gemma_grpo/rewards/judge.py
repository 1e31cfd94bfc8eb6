"""Judges of yes/no questions about completions, asked in parallel and for a limited time.

A judge is a function of a list of `Question`s that gives a verdict for each: True or False, or the
probability of "yes" in [0, 1]. It may be an `async def`. A judge that raises, takes too long or
answers anything else stops nothing: those questions have no verdict. Does not import jax.
"""

import asyncio
import hashlib
import inspect
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

from gemma_grpo.errors import described, shown
from gemma_grpo.rewards.custom import load_function
from gemma_grpo.rewards.weights import RubricConfig


@dataclass(frozen=True)
class Question:
    """A yes/no question about one completion.

    Attributes:
        prompt, completion, answer: as in `Sample`; `answer` is the gold answer.
        criterion: what is asked, such as "Does it say how many looks are needed?".
    """

    prompt: str
    completion: str
    answer: str
    criterion: str


@dataclass(frozen=True)
class Judge:
    """A judge, and what its verdicts are filed under.

    Attributes:
        name: of its column in the records.
        version: verdicts of another version are not its own.
        ask: questions -> verdicts, or an awaitable of them.
        in_threads: its calls run in threads, with a timeout. A model's do not: one call with all
            questions runs in the caller's thread, so that no other program uses its devices.
    """

    name: str
    version: str
    ask: Callable[[Sequence[Question]], Any]
    in_threads: bool = True


def load_judge(location: str) -> Judge:
    """The judge "path/to/file.py:function"; its version is a digest of the file.

    Raises:
        UserError: as `custom.load_function`.
    """
    ask = load_function(location, what="judge")
    path, _, name = location.rpartition(":")
    return Judge(name, hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16], ask)


@dataclass(frozen=True)
class Answered:
    """What one call, or the end of the wait, gave.

    Attributes:
        questions: asked in it, as places in the list of all.
        verdicts: of these, in [0, 1]; None where there is none.
        reason: why the first without a verdict has none; "" if all have.
    """

    questions: range
    verdicts: list[float | None]
    reason: str


class Calls:
    """A judge's calls. At most `limits.parallel` run at a time, those left hanging included."""

    def __init__(self, judge: Judge, limits: RubricConfig):
        self._judge, self._limits = judge, limits
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._hanging: list[Future] = []
        workers = limits.parallel if judge.in_threads else 0
        for _ in range(workers):
            # Daemons: a judge that hangs does not keep the process from ending.
            threading.Thread(target=_work, args=(self._waiting,), daemon=True).start()
        weakref.finalize(self, _dismiss, self._waiting, workers)

    def ask(self, questions: Sequence[Question]) -> Iterator[Answered]:
        """The verdicts, call by call as they come, each question in one of them."""
        whole, limits = range(len(questions)), self._limits
        if not self._judge.in_threads:
            yield _answered(whole, partial(self._judge.ask, questions))
            return
        self._hanging = [call for call in self._hanging if not call.done()]
        if len(self._hanging) == limits.parallel:
            yield _none(whole, f"all {limits.parallel} parallel calls hang since earlier steps")
            return
        calls = {}
        for start in whole[:: limits.per_call]:
            part = whole[start : start + limits.per_call]
            asked = [questions[place] for place in part]
            call: Future = Future()
            self._waiting.put((call, partial(_call, self._judge.ask, asked, limits.timeout)))
            calls[call] = part
        left = dict(calls)
        try:
            for call in as_completed(calls, limits.timeout):
                yield _answered(left.pop(call), call.result)
        except TimeoutError:
            self._hanging += [call for call in left if not call.cancel() and not call.done()]
            for part in left.values():
                yield _none(part, f"no verdict within {limits.timeout:g} seconds")


def _work(waiting: queue.SimpleQueue) -> None:
    while (item := waiting.get()) is not None:
        _run(*item)


def _run(call: Future, function: Callable[[], Any]) -> None:
    if not call.set_running_or_notify_cancel():
        return
    try:
        call.set_result(function())
    except BaseException as error:  # sys.exit too: a judge ends no thread of ours
        call.set_exception(error)


def _dismiss(waiting: queue.SimpleQueue, workers: int) -> None:
    for _ in range(workers):
        waiting.put(None)


class _Daemons(ThreadPoolExecutor):
    """Runs each function in a daemon thread of its own: Python waits for those of other executors
    before the process ends."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        call: Future = Future()
        function = partial(fn, *args, **kwargs)
        threading.Thread(target=_run, args=(call, function), daemon=True).start()
        return call


def _call(ask: Callable, questions: list[Question], timeout: float) -> list[Any]:
    """What the judge gives, taken here and not where it could stop a step: it may be a generator. A
    coroutine runs in an event loop of its own, cancelled in time."""
    given = ask(questions)
    if not inspect.isawaitable(given):
        return _listed(given)

    async def awaited() -> Any:
        asyncio.get_running_loop().set_default_executor(_Daemons())
        return await asyncio.wait_for(given, timeout)

    return _listed(asyncio.run(awaited()))


def _listed(given: Any) -> list[Any]:
    if isinstance(given, Mapping | Set | str):  # whose items would pass for verdicts
        raise TypeError(f"a {type(given).__name__} in place of a list of verdicts")
    return list(given)


def _answered(questions: range, result: Callable[[], Any]) -> Answered:
    try:
        given = _listed(result())
    except KeyboardInterrupt:  # a notebook's stop button
        raise
    except BaseException as error:
        return _none(questions, f"raised {described(error)}")
    if len(given) != len(questions):
        return _none(questions, f"gave {len(given)} verdicts for {len(questions)} questions")
    verdicts = [_verdict(value) for value in given]
    bad = [value for value, verdict in zip(given, verdicts, strict=True) if verdict is None]
    reason = f"gave {shown(bad[0])}, no True, False or number in [0, 1]" if bad else ""
    return Answered(questions, verdicts, reason)


def _none(questions: range, reason: str) -> Answered:
    return Answered(questions, [None] * len(questions), reason)


def _verdict(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, SupportsFloat) else -1.0
    except Exception:
        return None
    return number if 0.0 <= number <= 1.0 else None

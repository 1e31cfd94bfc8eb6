"""Rewards, rubrics and judges of the user's own, met by `train --dry-run`."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.campaign.doors.case import DAMAGES, Case, all_of, written
from benchmarks.campaign.doors.settings import FEW

TRAIN = ["train", *FEW]
BATCH = "from gemma_grpo.rewards import batch_reward\n@batch_reward\n"

REWARDS = {  # the file, and what must come of it
    "good": ("def f(sample):\n    return 1.0\n", "accepted"),
    "an int": ("def f(sample):\n    return 1\n", "accepted"),
    "a bool": ("def f(sample):\n    return True\n", ""),
    "a NumPy number": (
        "import numpy as np\ndef f(sample):\n    return np.float32(0.5)\n",
        "accepted",
    ),
    "None": ("def f(sample):\n    pass\n", "refused"),
    "a text": ("def f(sample):\n    return '1'\n", "refused"),
    "nan": ("def f(sample):\n    return float('nan')\n", "refused"),
    "infinity": ("def f(sample):\n    return 1e400\n", "refused"),
    "a huge int": ("def f(sample):\n    return 10**400\n", "refused"),
    "a complex number": ("def f(sample):\n    return 1j\n", "refused"),
    "a list": ("def f(sample):\n    return [1.0]\n", "refused"),
    "an array": ("import numpy as np\ndef f(sample):\n    return np.zeros(3)\n", "refused"),
    "an array of one": ("import numpy as np\ndef f(sample):\n    return np.zeros(1)\n", ""),
    "itself": ("def f(sample):\n    return f\n", "refused"),
    "an error": ("def f(sample):\n    raise ValueError('x')\n", "refused"),
    "an error of many lines": ("def f(sample):\n    raise ValueError('a\\nb\\nc')\n", "refused"),
    "an error without text": (
        "class E(Exception):\n    def __str__(self):\n        raise RuntimeError\n"
        "def f(sample):\n    raise E\n",
        "refused",
    ),
    "sys.exit(0)": ("import sys\ndef f(sample):\n    sys.exit(0)\n", "refused"),
    "KeyboardInterrupt": ("def f(sample):\n    raise KeyboardInterrupt\n", ""),
    "GeneratorExit": ("def f(sample):\n    raise GeneratorExit\n", "refused"),
    "StopIteration": ("def f(sample):\n    raise StopIteration\n", "refused"),
    "endless recursion": ("def f(sample):\n    return f(sample)\n", "refused"),
    "a group of errors": (
        "def f(sample):\n    raise ExceptionGroup('x', [ValueError('y')])\n",
        "refused",
    ),
    "no argument": ("def f():\n    return 1.0\n", "refused"),
    "two arguments": ("def f(a, b):\n    return 1.0\n", "refused"),
    "any arguments": ("def f(*a):\n    return 1.0\n", "accepted"),
    "a coroutine": ("async def f(sample):\n    return 1.0\n", "refused"),
    "a generator": ("def f(sample):\n    yield 1.0\n", "refused"),
    "a class": ("class f:\n    def __init__(self, sample):\n        pass\n", "refused"),
    "a class that counts": (
        "class f(float):\n    def __new__(cls, sample):\n        return float.__new__(cls, 1)\n",
        "",
    ),
    "a number": ("f = 1.0\n", "refused"),
    "None for a name": ("f = None\n", "refused"),
    "another name": ("def g(sample):\n    return 1.0\n", "refused"),
    "a lambda": ("f = lambda sample: 1.0\n", "accepted"),
    "a partial": ("import functools\nf = functools.partial(lambda a, s: 1.0, 0)\n", ""),
    "no syntax": ("def f(sample)\n    return 1.0\n", "refused"),
    "an import that is not there": (
        "import no_such_module\ndef f(sample):\n    return 1.0\n",
        "refused",
    ),
    "an error on import": ("1 / 0\n", "refused"),
    "exit on import": ("raise SystemExit(0)\n", "refused"),
    "a frozen sample": ("def f(sample):\n    sample.completion = ''\n    return 1.0\n", "refused"),
    "prints": ("def f(sample):\n    print('x' * 100)\n    return 1.0\n", "accepted"),
    "not UTF-8": (b"def f(sample):\n    return '\xff'\n", "refused"),
    "a NUL": ("def f(sample):\n    return 1.0\n\0", "refused"),
    "nothing": ("", "refused"),
    "a sibling": ("import helper\ndef f(sample):\n    return helper.x\n", "refused"),
    "its own folder": (
        "from pathlib import Path\nx = Path(__file__).name\ndef f(sample):\n    return 1.0\n",
        "accepted",
    ),
    "an attribute it lacks": ("def f(sample):\n    return sample.no_such\n", "refused"),
    "a hundred decorators": ("f = lambda s: 1.0\n" + "g = f\n" * 100, "accepted"),
    "a batch without its mark": ("def f(samples):\n    return [1.0 for s in samples]\n", "refused"),
    "a batch": (
        f"{BATCH}def f(samples):\n    return [1.0] * len(samples)\n",
        "accepted",
    ),
    "a batch too short": (
        f"{BATCH}def f(samples):\n    return []\n",
        "refused",
    ),
    "a batch of None": (
        f"{BATCH}def f(samples):\n    return None\n",
        "refused",
    ),
}


def cases(material: Path) -> Iterator[Case]:
    """Files of functions, specs of them, files of criteria."""
    yield from _rewards()
    yield from _rubrics()


def _rewards() -> Iterator[Case]:
    for name, (text, wanted) in REWARDS.items():
        yield Case("reward", name, [*TRAIN, "--reward=w.py:f"], written("w.py", text), wanted)
    good = written("w.py", REWARDS["good"][0])
    for damage, change in DAMAGES.items():
        make = all_of(good, lambda folder, c=change: c(folder / "w.py"))
        yield Case("reward", f"file: {damage}", [*TRAIN, "--reward=w.py:f"], make)
    for spec in (
        "w.py:f=nan",
        "w.py:f=inf",
        "w.py:f=x",
        "w.py:f=",
        "w.py:",
        "w.py:f:g",
        "w.py",
        "w:f",
        "w.py:f.g",
        "w.py:f()",
        "w.py:__name__",
        "w.py:f=1=2",
        "w.py:f =1",
        " w.py:f",
        "session:f",
        "w.py:f=1e400",
        "w.py:f=0x10",
        "w.py:F",
    ):
        yield Case(
            "reward",
            spec,
            [*TRAIN, f"--reward={spec}"],
            good,
            "" if spec in (" w.py:f", "w.py:f =1") else "refused",
        )
    for spec in ("w.py:f=0", "w.py:f=-1", "w.py:f=1e308", "./w.py:f", "w.py:f=1e-400"):
        yield Case("reward", spec, [*TRAIN, f"--reward={spec}"], good, "accepted")
    twice = ["--reward=w.py:f", "--reward=w.py:f=2"]
    yield Case("reward", "twice", [*TRAIN, *twice], good, "refused")
    for name in ("correctness", "format", "mean", "std", "reward", "prompt", "logp"):
        make = written("w.py", f"def {name}(sample):\n    return 1.0\n")
        yield Case("reward", f"named {name}", [*TRAIN, f"--reward=w.py:{name}"], make, "refused")


JUDGES = (
    "j.py:j=nan",
    "j.py:j=x",
    "j.py:k=1",
    "j.py",
    "model:",
    "model:=1",
    "model:x=1",
    "model:gemma3-1b=1",
    ":",
    "",
    "j.py:j=1=2",
    "x.py:j=1",
)


def _rubrics() -> Iterator[Case]:
    judge = "def j(questions):\n    return [1.0] * len(questions)\n"
    ask = "addition:\n  - Is it short?\n"
    run = [*TRAIN, "--rubric=r.yaml", "--judge=j.py:j=1"]
    both = lambda rubric, judge=judge: all_of(written("r.yaml", rubric), written("j.py", judge))
    yield Case("rubric", "good", run, both(ask), "accepted")
    rubrics = {
        "nothing": "",
        "a list": "- x\n",
        "a text": "x\n",
        "an unknown domain": "x:\n  - y?\n",
        "no criteria": "addition: []\n",
        "null criteria": "addition:\n",
        "a number": "addition:\n  - 7\n",
        "a null": "addition:\n  - null\n",
        "a blank": "addition:\n  - ' '\n",
        "the same twice": "addition:\n  - a\n  - a\n",
        "an unknown field": "addition:\n  - ask: a\n    wait: 1\n",
        "weight 0": "addition:\n  - ask: a\n    weight: 0\n",
        "weight nan": "addition:\n  - ask: a\n    weight: .nan\n",
        "weight true": "addition:\n  - ask: a\n    weight: true\n",
        "weight x": "addition:\n  - ask: a\n    weight: x\n",
        "no ask": "addition:\n  - weight: 1\n",
        "a colon": "addition:\n  - a: b\n",
        "a list within": "addition:\n  - [a]\n",
        "a thousand brackets": "addition: " + "[" * 1000,
        "5,000 digits": "addition:\n  - ask: a\n    weight: " + "9" * 5000 + "\n",
        "a null domain": "null:\n  - a\n",
        "a list for a domain": "[a]:\n  - b\n",
        "an object": "addition: !!python/object:x {}\n",
        "a mapping": "addition:\n  a: b\n",
        "weight 10**400": "addition:\n  - ask: a\n    weight: 1" + "0" * 400 + "\n",
        "a key twice": "addition:\n  - a\naddition:\n  - b\n",
        "aliases": "a: &a [x]\naddition: *a\n",
        "a mapping for a domain": "{a: 1}: [b]\n",
        "a field that is a list": "addition:\n  - {[a]: 1}\n",
    }
    for name, rubric in rubrics.items():
        yield Case("rubric", name, run, both(rubric), "refused")
    for damage, change in DAMAGES.items():
        make = all_of(both(ask), lambda folder, c=change: c(folder / "r.yaml"))
        yield Case("rubric", f"file: {damage}", run, make)
        make = all_of(both(ask), lambda folder, c=change: c(folder / "j.py"))
        yield Case("judge", f"file: {damage}", run, make)
    for spec in JUDGES:
        yield Case("judge", spec, [*run[:-1], f"--judge={spec}"], both(ask), "refused")
    yield Case("judge", "without a rubric", [*TRAIN, "--judge=j.py:j=1"], both(ask), "refused")
    yield Case("rubric", "without a judge", [*TRAIN, "--rubric=r.yaml"], both(ask), "refused")
    yield Case("judge", "twice", [*run, "--judge=j.py:j=2"], both(ask), "refused")

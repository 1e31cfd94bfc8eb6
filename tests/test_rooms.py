"""The rooms of gemma_grpo: imports point down, and some files do not import jax. Nothing is run."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

from benchmarks import house
from benchmarks.house import PACKAGE, ROOT, imports_in, rooms_below

FLOORS = (
    "errors kernels",
    "devices model objective data text",
    "rewards weights records",
    "runtime",
    "generation training evaluation",
    "config presets",
    "pipeline planning cli view",
    "api",
    "train evaluate generate export rescore ablation pretrain plan verify_kernels",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
COMMANDS = set(FLOORS[-1].split())
NO_JAX = (  # files whose imports, and theirs, reach no device library
    "errors data/problem data/curriculum data/gsm8k data/jsonl data/kaggle data/sources "
    "data/tables text/tokenizer text/padding text/prompts rewards/answers rewards/components "
    "rewards/scores rewards/custom evaluation/statistics training/packing "
    "records/report records/metrics records/tokens records/read records/trace view/collect "
    "view/page view/terminal view/__init__ rewards/rescoring rescore records/watch "
    "records/metric_notes records/trackers records/progress"
).split()
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_every_room_is_on_a_floor_and_every_floor_is_furnished():
    assert house.rooms() == FLOOR.keys()


@pytest.mark.parametrize("room", FLOOR)
def test_imports_point_down(room):
    up = {other for other in rooms_below(room) if FLOOR[other] > FLOOR[room]}
    assert not up, f"{room} (floor {FLOOR[room]}) imports {up} from above"


def test_imports_within_a_floor_make_no_ring():
    graph = {room: rooms_below(room) for room in FLOOR}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_modules_within_a_room_make_no_ring():
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.stem != "__init__"
    }
    graph = {name: imports_in(path.read_text()) & paths.keys() for name, path in paths.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_nobody_imports_a_command():
    for room in FLOOR:
        assert not rooms_below(room) & COMMANDS, room


def test_the_map_imports_nothing():
    names = imports_in((PACKAGE / "__init__.py").read_text())
    assert not {name for name in names if name.startswith("gemma_grpo")}


def test_the_map_lists_no_room_below_one_that_it_imports():
    words = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text()))
    lines = words.partition("(tests/test_rooms.py):")[2].split("\n")
    rows = [line.split("    ")[1].split() if line.startswith("    ") else [] for line in lines]
    line_of = {room: number for number, rooms in enumerate(rows) for room in rooms if room in FLOOR}
    assert line_of.keys() == FLOOR.keys()
    for room in FLOOR:
        assert all(line_of[room] <= line_of[other] for other in rooms_below(room)), room


def modules_below(path: Path) -> set[Path]:
    """The files of gemma_grpo that a file imports, packages' own `__init__` included."""
    below = set()
    for name in imports_in(path.read_text()):
        parts = name.split(".")
        if parts[0] == "gemma_grpo":
            for length in range(2, len(parts) + 1):
                base = PACKAGE.joinpath(*parts[1:length])
                below |= {f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()}
    return below


@pytest.mark.parametrize("module", NO_JAX)
def test_these_files_do_not_import_jax_themselves_nor_through_others(module):
    seen, todo = set(), {PACKAGE / f"{module}.py"}
    while todo:
        seen.add(here := todo.pop())
        libraries = {name.split(".")[0] for name in imports_in(here.read_text())}
        assert not libraries & DEVICE_LIBRARIES, here
        todo |= modules_below(here) - seen


def test_the_model_and_the_math_know_no_text():
    text = {"text", "data", "rewards"}
    for folder in ("model", "objective", "kernels"):
        assert not rooms_below(folder) & text, folder
    for module in ("generation/sampling", "generation/rollout", "training/logps"):
        names = imports_in((PACKAGE / f"{module}.py").read_text())
        assert not {name.split(".")[1] for name in names if name.startswith("gemma_grpo.")} & text


def test_the_house_keeps_its_measure():
    assert len(list(PACKAGE.glob("*.py"))) <= 18
    assert len(FLOOR) <= 30 and sum(len(rooms_below(room)) for room in FLOOR) <= 130


def test_a_function_is_seen_at_once():
    functions = list(house.functions())
    over = [place for place, lines, _ in functions if lines > house.MOST_LINES]
    assert not over
    # Of more than six arguments: Pallas kernels, which take a reference for each array, the ops in
    # front of them, attention's constructor (its sizes) and the decoding step (weights, caches).
    many = [place for place, _, number in functions if number > house.MOST_ARGUMENTS]
    assert len(many) <= 10, many


def test_code_and_documents_speak_the_words_of_the_field():
    assert not house.dialect()


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("Knows no model.", 1),
        ("how to mend it", 1),
        ("rollout_layout: hybrid", 1),
        ("the so many likeliest", 1),
        ("the seed document's table", 1),
        ("runs in the first process", 1),
        ("at first sight, recommended", 0),
        ("zero elsewhere", 0),
        ("the random seed", 0),
        ("in other words", 0),
    ],
)
def test_the_reader_of_words_sees_the_dialect_and_leaves_english(line, wrong):
    assert sum(bool(re.search(pattern, line)) for pattern in house.DIALECT) == wrong


def test_kernels_are_never_imported_by_the_bare_name():
    own = [path for folder in ("gemma_grpo", "tests", "benchmarks") for path in ROOT.glob(folder)]
    for path in (path for folder in own for path in folder.rglob("*.py")):
        first_names = {name.split(".")[0] for name in imports_in(path.read_text())}
        assert "kernels" not in first_names, path


def test_the_reader_of_imports_sees_every_form():
    source = "import a.b as c\ndef f():\n    from gemma_grpo.x import y\nfrom gemma_grpo import z"
    assert imports_in(source) == {
        "a.b",
        "gemma_grpo.x",
        "gemma_grpo.x.y",
        "gemma_grpo",
        "gemma_grpo.z",
    }

"""The rooms of gemma_grpo: imports point down, and some rooms know no jax. Nothing is imported."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_grpo"

FLOORS = (
    "errors answers rewards advantages losses loss_checks statistics mesh processes kernels",
    "model weights data tokenizer sampling padding assets "
    "topology compiled compile_clock hlo traced roofline",
    "rollout logps train_state accumulation update scoring runtime",
    "collect generation chat evaluation checkpoint metrics report model_card interrupt loop",
    "sft grpo grpo_update",
    "config presets pipeline cli programs planning",
    "train evaluate generate export ablation pretrain plan verify_kernels",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
FOLDERS_WITHOUT_CODE = {"gemma3_nano"}  # package data
COMMANDS = set(FLOORS[-1].split())
NO_JAX = ("errors", "answers", "rewards", "statistics", "tokenizer", "data", "padding", "assets")
DEVICE_LIBRARIES = {"jax", "jaxlib", "flax", "optax", "orbax"}


def imports_in(source: str) -> set[str]:
    """Dotted names that a module imports, at any depth; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(room: str) -> list[Path]:
    """A room is a module or a package."""
    folder = (PACKAGE / room).resolve()  # kernels is a link
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def imported_by(room: str) -> set[str]:
    return set().union(*(imports_in(path.read_text()) for path in files_of(room)))


def rooms_below(room: str) -> set[str]:
    """The other rooms that a room imports."""
    parts = [name.split(".") for name in imported_by(room)]
    return {p[1] for p in parts if p[0] == "gemma_grpo" and len(p) > 1} - {room}


def test_every_room_is_on_a_floor_and_every_floor_is_furnished():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert (modules | packages) - FOLDERS_WITHOUT_CODE == FLOOR.keys()


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
    assert imports_in((PACKAGE / "__init__.py").read_text()) == set()


@pytest.mark.parametrize("room", NO_JAX)
def test_these_rooms_know_no_jax_themselves_nor_through_others(room):
    seen, todo = set(), {room}
    while todo:
        seen |= (here := {todo.pop()})
        libraries = {name.split(".")[0] for name in imported_by(*here)}
        assert not libraries & DEVICE_LIBRARIES, here
        todo |= rooms_below(*here) - seen


def test_the_model_and_the_math_know_no_text():
    for room in ("model", "sampling", "losses", "advantages", "rollout", "logps"):
        assert not rooms_below(room) & {"tokenizer", "data", "padding", "rewards", "answers"}, room


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

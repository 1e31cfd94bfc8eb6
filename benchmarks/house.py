"""How easily a reader finds the way in the repository: sizes, imports, words. One JSON line.

    python -m benchmarks.house
    python -m benchmarks.house --where      also each place that a figure counts

Reads the files as text and imports none of them. `tests/test_rooms.py` holds the figures.
"""

import argparse
import ast
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gemma_grpo"
CODE = ("gemma_grpo", "kernels", "benchmarks", "tests")  # folders; gemma_grpo/kernels is a link
WITHOUT_CODE = {"gemma3_nano"}  # package data
MOST_LINES, MOST_ARGUMENTS, WIDTH = 60, 6, 110

# Words of our own for what the field has a name for: pattern -> what to say.
DIALECT = {
    r"\bKnows no": "nothing, or: Does not import X",
    r"(?<!first )\b[Ss]ights?\b": "block mask",
    r"\belsewhere *[=(:]": "fallback",
    r"\bComputing\b": "GatheredParams",
    r"\bruntime\.full\b": "sampling_params",
    r"\b(from|on)_first\b": "broadcast_from_primary, run_on_primary",
    r"\bfirst process\b": "primary process",
    r"\bmesh(es)?\.(rows|whole|spread|described)\b": "batch_sharding, replicated, fsdp_shardings",
    r"\b[Hh]ybrid\b": "tensor_parallel",
    r"\b[Mm]end(s|ed|ing)?\b": "fix",
    r"\bso many\b": "this many",
    r"\b([Ss]eed document|the seed's (document|table|figures|annealing|rows?))\b": "the original",
    r"\b(all|another) words?\b|\b(other|same)_words?\b": "token, vocabulary",
    r"\b(attention's|packed|[Mm]atrix) products?\b|\bproducts with\b": "matmul",
    r"\b[Mm]utants?\b": "injected bug",
    r"(?<![\w.])[Ll]aws? (of|that)\b": "invariant, reference",
}
SPEAK_OF_THEM = (  # files in which such a word is the subject
    "benchmarks/house.py",
    "CHANGELOG.md",  # the layout's name of earlier versions
    "gemma_grpo/config.py",
    "tests/test_rooms.py",
    "tests/test_pipeline.py",
    "tests/weights/test_hf_config.py",  # Hugging Face's hybrid cache
)


def code_files() -> list[Path]:
    """All Python files of the repository, each once."""
    folders = (ROOT / folder for folder in CODE)
    return sorted({path.resolve() for folder in folders for path in folder.rglob("*.py")})


def documents() -> list[Path]:
    """All Markdown files of the repository."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@functools.cache
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


def rooms() -> set[str]:
    """The modules and folders at the package's top, but for what the package itself is."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    return (modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}) - WITHOUT_CODE


def rooms_below(room: str) -> set[str]:
    """The other rooms that a room imports."""
    folder = (PACKAGE / room).resolve()  # kernels is a link
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
    parts = [name.split(".") for path in files for name in imports_in(path.read_text())]
    return {p[1] for p in parts if p[0] == "gemma_grpo" and len(p) > 1} - {room}


def functions() -> Iterator[tuple[str, int, int]]:
    """(place, lines, arguments without self) of each function, decorators left out."""
    for path in code_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                of = node.args
                names = [each.arg for each in (*of.posonlyargs, *of.args, *of.kwonlyargs)]
                number = sum(name not in ("self", "cls") and name[0] != "_" for name in names)
                place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
                yield place, node.end_lineno - node.lineno + 1, number


def long_lines() -> list[str]:
    """Lines of Markdown over the width, tables left out."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in documents()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > WIDTH and not line.lstrip().startswith("|")
    ]


def dialect() -> list[str]:
    """Places of words in `DIALECT`, with what to say instead."""
    found = []
    for path in [*code_files(), *documents()]:
        name = str(path.relative_to(ROOT))
        if name in SPEAK_OF_THEM:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, instead in DIALECT.items():
                if hit := re.search(pattern, line):
                    found.append(f"{name}:{number} {hit[0]!r}: {instead}")
    return found


def front_door() -> dict[str, float]:
    """README.md's words, those before its first command, and its words of prose per number."""
    text = (ROOT / "README.md").read_text()
    before = text.partition("```bash")[0]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("|")).split()
    numbers = sum(bool(re.search(r"\d", word)) for word in prose)
    return {
        "readme_words": len(text.split()),
        "readme_words_before_command": len(before.split()),
        "readme_words_per_number": round(len(prose) / max(numbers, 1), 1),
    }


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--where", action="store_true", help="also each place that is counted")
    where = parser.parse_args().where
    each = list(functions())
    places = {
        "long_functions": [place for place, lines, _ in each if lines > MOST_LINES],
        "many_arguments": [place for place, _, number in each if number > MOST_ARGUMENTS],
        "long_lines": long_lines(),
        "dialect": dialect(),
    }
    figures = {
        "top_files": len(list(PACKAGE.glob("*.py"))),
        "rooms": len(rooms()),
        "arrows": sum(len(rooms_below(room)) for room in rooms()),
        "longest_function": max(lines for _, lines, _ in each),
        **{name: len(found) for name, found in places.items()},
        **front_door(),
    }
    print(json.dumps(figures))
    if where:
        for name, found in places.items():
            print(name, *found, sep="\n  ")
        print(Counter(entry.split(":")[0] for entry in places["dialect"]).most_common(10))


if __name__ == "__main__":
    main()

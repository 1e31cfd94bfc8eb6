"""The page: one HTML file that holds its data, script and style, and asks nothing of a network."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gemma_grpo.errors import UserError
from gemma_grpo.records import files
from gemma_grpo.view.collect import bytes_of, collect

FOLDER = resources.files("gemma_grpo.view") / "page"
SCRIPTS = ("data", "parts", "overview", "problems", "steps", "list", "main")
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Inline:
    """A page that a notebook shows in a frame of its own, so that neither's style nor script
    reaches the other.

    Attributes:
        html: of the page.
        height: of the frame, pixels.
    """

    html: str
    height: int = 800

    def _repr_html_(self) -> str:
        text = self.html.replace("&", "&amp;").replace("'", "&#39;")
        style = f"width:100%;height:{self.height}px;border:0"
        return f"<iframe sandbox='allow-scripts' style='{style}' srcdoc='{text}'></iframe>"


def write(run_dirs: Sequence[Path], path: Path, megabytes: int | float) -> int:
    """Writes the page of these runs, whole or not at all; returns its bytes.

    Args:
        megabytes: of the page at most; a larger one gets fewer problems and training steps.

    Raises:
        UserError: a folder is no run's, or the file cannot be written.
    """
    if path.is_file() and not _is_page(path):
        raise UserError(f"{path} is there already, and no page of a run; name another with --out")
    page = html(run_dirs, megabytes).encode("utf-8", errors="replace")
    with files.atomic_write(path, another_place="name another file with --out") as unfinished:
        unfinished.write_bytes(page)
    return len(page)


def _is_page(path: Path) -> bool:
    """Whether a file begins as all pages do."""
    beginning = _template("page.html").partition("@@")[0].encode()
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning


def html(run_dirs: Sequence[Path], megabytes: int | float) -> str:
    """The text of the page. Arguments and errors as `write`."""
    room = megabytes * MEGABYTE
    # A completion takes at least half the bytes that it takes in the run's own files.
    share = min(1.0, 2 * room / max(bytes_of(run_dirs), 1))
    for _ in range(4):
        data = embedded(collect(run_dirs, share))
        if len(data) <= room:
            break
        share *= 0.9 * room / len(data)
    page = _template("page.html")
    script = "".join(_template(f"{name}.js") for name in SCRIPTS)
    for name, text in (("style", _template("page.css")), ("script", script), ("data", data)):
        page = page.replace(f"@@{name}@@", text, 1)
    return page


def embedded(value: Any) -> str:
    """JSON that may stand in a `<script>` element: no "<" in it closes or opens anything."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _template(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")

"""Takes the pictures of docs/see.md, of a default run with --evaluation.every 40.

PYTHONPATH=.:tests python tests/view/pictures.py RUN
"""

import contextlib
import html
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from web_browser import Browser

from gemma_grpo import rescore
from gemma_grpo.view import page

DOCS = Path(__file__).parents[2] / "docs"
# Name, fragment of the address, height in pixels, dark, script before the picture.
PICTURES = [
    ("overview", "", 870, False, ""),
    ("problem", "view=problems&problem=303", 740, False, ""),
    ("snapshots", "view=problems&problem=18", 1090, False, ""),
    ("lost", "view=problems&seek=lost&colour=logp", 775, True, ""),
    ("unsure", "view=steps&step=3&colour=logp", 760, False, ""),
    (
        "loss",
        "",
        870,
        False,
        "const panel = [...document.querySelectorAll('.panel')]"
        ".find((each) => each.innerText.startsWith('GRPO loss'));"
        "panel.querySelector('details').open = true; scrollTo(0, panel.offsetTop - 260)",
    ),
]
WIDTHS = {"snapshots": 1260}
REWARD = "def brevity(sample):\n    return 1 - sample.num_tokens / sample.max_tokens\n"


def terminal(command: str, text: str) -> str:
    """A page that shows what a command printed."""
    style = "background:#18191d;color:#e8e8ea;font:14px/1.48 monospace;margin:18px"
    shown = html.escape(f"$ {command}\n{text}")
    return f"<meta charset=utf-8><body style='{style}'><pre>{shown}</pre>"


def rescored(run: Path, folder: Path) -> str:
    """What rescore prints of the run, as a page."""
    (folder / "my_rewards.py").write_text(REWARD)
    reward = f"{folder / 'my_rewards.py'}:brevity=0.1"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        rescore.main([str(run), "--reward", reward])
    command = f"python -m gemma_grpo.rescore {run.name} --reward my_rewards.py:brevity=0.1"
    return terminal(command, said.getvalue())


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "profile") as browser:

        def shoot(name: str, address: str, height: int, dark: bool, script: str) -> None:
            browser.open(address, width=WIDTHS.get(name, 1200), height=height, dark=dark)
            browser.run(script)
            path = DOCS / f"see-{name}.png"
            browser.screenshot(path)
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)

        shown = Path(folder) / "view.html"
        page.write([run], shown, 8)
        for name, fragment, height, dark, script in PICTURES:
            shoot(name, f"{shown.as_uri()}#{fragment}", height, dark, script)
        printed = Path(folder) / "rescored.html"
        printed.write_text(rescored(run, Path(folder)))
        shoot("rescore", printed.as_uri(), 850, True, "")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

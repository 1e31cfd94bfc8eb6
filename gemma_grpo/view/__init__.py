"""The viewing command: what runs wrote, as one HTML file that opens in any browser, or as text.

python -m gemma_grpo.view RUN [RUN ...]            writes RUN/view.html
python -m gemma_grpo.view RUN --text [--problem N]
python -m gemma_grpo.view RUN RUN --text           compares each with the first, paired by problem
"""

import argparse
from pathlib import Path

from gemma_grpo.errors import FlagParser, UserError, guarded
from gemma_grpo.view import page, terminal


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return guarded(lambda: _view(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="python -m gemma_grpo.view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--out",
        type=Path,
        help="a file for the page, replaced if it is there (default RUN/view.html)",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        default=8.0,
        help="most data on the page; beyond it, problems and training steps are left out "
        "evenly, and the page says how many (default 8)",
    )
    parser.add_argument("--text", action="store_true", help="print to the terminal instead")
    parser.add_argument("--problem", type=int, metavar="N", help="with --text: only this problem")
    return parser


def _view(options: argparse.Namespace) -> int:
    if options.problem is not None and not options.text:
        raise UserError("--problem goes with --text; in the page, open Problems")
    if not options.megabytes > 0:
        raise UserError(f"--megabytes {options.megabytes:g}: give a number above 0")
    if options.text and options.out:
        raise UserError("--out is the page's: without it, --text prints, and > FILE keeps that")
    if options.text:
        for run in options.runs:
            if len(options.runs) > 1:
                print(f"{run}:")
            terminal.show(run, options.problem)
        if options.problem is None:
            terminal.show_comparisons(options.runs)
        return 0
    path = options.out or options.runs[0] / "view.html"
    size = page.write(options.runs, path, options.megabytes)
    print(f"{path} ({size / page.MEGABYTE:.1f} MB): open it in a browser")
    return 0

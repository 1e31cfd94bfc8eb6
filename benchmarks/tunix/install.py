"""Makes the Python environment that Tunix runs in.

python -m benchmarks.tunix.install [--cuda]

About 1.6 GB and a minute: google-tunix, the newest on PyPI, with the jax it chooses, and the TPU's
compiler. It goes to $TUNIX_ENV, or to .tunix-env here, with the Python that runs this. Tunix must
not see this repository: its `kernels` is the name of another package.
"""

import os
import subprocess
import sys
from pathlib import Path

import tyro

FOLDER = Path(os.environ.get("TUNIX_ENV") or ".tunix-env")
PYTHON = FOLDER / "bin" / "python"


def main(cuda: bool = False) -> None:
    """Make it, or bring it up to date; `cuda` with what jax needs on a GPU."""
    subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    packages = ["google-tunix", "libtpu", *(["jax[cuda12]"] if cuda else [])]
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", "--upgrade", *packages], check=True)


def check() -> Path:
    """The environment's interpreter, or exit with the command that makes it."""
    if not PYTHON.exists():
        raise SystemExit(f"no Tunix in {FOLDER}: run python -m benchmarks.tunix.install")
    return PYTHON.absolute()


if __name__ == "__main__":
    tyro.cli(main)

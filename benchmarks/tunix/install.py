"""Makes the Python environment that Tunix runs in.

python -m benchmarks.tunix.install [--folder .tunix-env] [--python python3.11] [--cuda]

About 1.6 GB and a minute: google-tunix, the newest on PyPI, with the jax it chooses, and the TPU's
compiler. Tunix must not see this repository: its `kernels` is the name of another package. Where
the environment is not in .tunix-env here, $TUNIX_ENV says where.
"""

import os
import subprocess
import sys
from pathlib import Path

import tyro

FOLDER = Path(os.environ.get("TUNIX_ENV") or ".tunix-env")
PACKAGES = ("google-tunix", "libtpu")
CUDA = "jax[cuda12]"  # as our own extra has it


def main(folder: Path = FOLDER, python: str = sys.executable, cuda: bool = False) -> None:
    """Make it, or bring it up to date.

    Args:
        folder: of the environment.
        python: interpreter to make it with; the same version as ours is the fairest.
        cuda: with what jax needs on a GPU.
    """
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*command, *PACKAGES, *([CUDA] if cuda else [])], check=True)
    print(f"Tunix is in {folder}; export TUNIX_ENV={folder} if that is not the default")


def check() -> Path:
    """The environment's interpreter, or exit with the command that makes it."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"no Tunix in {FOLDER}: run python -m benchmarks.tunix.install")
    return python


if __name__ == "__main__":
    tyro.cli(main)

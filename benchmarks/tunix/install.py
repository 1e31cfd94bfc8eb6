"""Makes the Python environment that Tunix runs in.

python -m benchmarks.tunix.install [--folder .tunix-env] [--python python3.11] [--cuda]

About 1.6 GB and a minute: google-tunix, the newest on PyPI, with the jax it chooses, and the TPU's
compiler. Tunix must not see this repository: its `kernels` is the name of another package.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import tyro

FOLDER_VARIABLE = "TUNIX_ENV"
PACKAGES = ("google-tunix", "libtpu")
CUDA = "jax[cuda12]"  # as our own extra has it


def main(folder: Path | None = None, python: str = sys.executable, cuda: bool = False) -> None:
    """Make it, or bring it up to date.

    Args:
        folder: of the environment; by default $TUNIX_ENV, or .tunix-env here.
        python: interpreter to make it with; the same version as ours is the fairest.
        cuda: with what jax needs on a GPU.
    """
    folder = folder or default_folder()
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    command = [str(interpreter(folder)), "-m", "pip", "install", "--quiet", "--upgrade"]
    subprocess.run([*command, *PACKAGES, *([CUDA] if cuda else [])], check=True)
    print(f"Tunix is in {folder}; export {FOLDER_VARIABLE}={folder} if that is not the default")


def default_folder() -> Path:
    """Where the environment is unless a flag says otherwise."""
    return Path(os.environ.get(FOLDER_VARIABLE) or ".tunix-env")


def interpreter(folder: Path) -> Path:
    """The environment's Python."""
    return folder / "bin" / "python"


def check(folder: Path) -> Path:
    """The interpreter, or exit with the command that makes it."""
    if not shutil.which(interpreter(folder)):
        raise SystemExit(f"no Tunix in {folder}: run python -m benchmarks.tunix.install")
    return interpreter(folder)


if __name__ == "__main__":
    tyro.cli(main)

"""The campaign's command line; each prints JSON lines, the last of them the sum.

python -m benchmarks.campaign kills|processes|disks|flips|inputs|bugs [--number N] [--seed S]
"""

import argparse
import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

NUMBERS = {"kills": 20, "processes": 10, "disks": 60, "flips": 500, "inputs": 0, "bugs": 1000}


def main(arguments: list[str] | None = None) -> int:
    """Runs one part of the campaign in a new temporary folder; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__)
    parser.add_argument("part", choices=NUMBERS)
    parser.add_argument("--number", type=int, help=f"how many; {NUMBERS}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.part != "bugs":  # for all children: programs that run a few times, compiled quickly
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    part = getattr(import_module(f"benchmarks.campaign.{options.part}"), options.part)
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        for line in part(Path(folder), options.number or NUMBERS[options.part], options.seed):
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

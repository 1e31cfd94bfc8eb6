"""TPU devices that are not there: what the TPU compiler takes in place of chips.

`pip install libtpu` brings the real compiler; it needs no TPU to compile for one.
"""

import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from gemma_grpo.devices import preflight
from gemma_grpo.errors import UserError

# The runtime would ask Google's metadata server what it runs on, and wait for an answer.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file lets one process compile at a time
}


def is_here() -> bool:
    """Whether this host has TPU chips, by their device files; JAX's devices stay untouched."""
    return bool(preflight.device_files())


def devices(name: str) -> Sequence[jax.Device]:
    """The devices of a topology such as "v5e:2x4" (one host of 8), "v5e:16x16" or "v5p:2x2x1", to
    compile for. v4 and v7x have two devices a chip.

    Raises:
        UserError: libtpu is not installed, or has no such topology.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if not re.fullmatch(r"\w+:[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", name):
        raise UserError(f"topology {name!r}: write it like v5e:2x4 or v5p:2x2x1")
    sides = tuple(int(side) for side in name.partition(":")[2].split("x"))
    # Up to eight chips in a plane stand in one host, as on Kaggle; libtpu's own default is four.
    is_one_host = len(sides) == 2 and math.prod(sides) <= 8
    how = {"chips_per_host_bounds": (*sides, 1)} if is_one_host else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **how).devices
    except Exception as error:
        raise UserError(
            f"topology {name!r}: {' '.join(str(error).split())[:160]}; pip install libtpu, and "
            "write the topology like v5e:2x4 or v5p:2x2x1"
        ) from error

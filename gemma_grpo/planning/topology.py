"""TPU devices that are not there: what the TPU compiler takes in place of chips.

`pip install libtpu` brings the real compiler; it needs no TPU to compile for one.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from gemma_grpo.devices import mesh as meshes
from gemma_grpo.devices import preflight
from gemma_grpo.errors import UserError
from gemma_grpo.planning import chips
from gemma_grpo.planning.chips import Chip

DEFAULT = "v5e:2x4"  # of Kaggle

# The runtime would ask Google's metadata server what it runs on, and wait for an answer.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file lets one process compile at a time
}


@dataclass(frozen=True)
class Target:
    """What a run is planned for.

    Attributes:
        name: for a reader.
        mesh: of all its devices.
        chip: what each of them can do.
    """

    name: str
    mesh: Mesh
    chip: Chip


def target(name: str) -> Target:
    """The chips of a topology; without a name those of this host, or v5e:2x4 if it has none.

    Raises:
        UserError: no such topology, no libtpu, or chips of unknown memory.
    """
    if not name and is_here():
        here, where = jax.devices(), f"{jax.device_count()} chips of this host"
        chip = chips.chip_here(here)
        if chip is None:
            kind = here[0].device_kind
            raise UserError(f"the memory of a {kind} is not known; name chips with --topology")
        return Target(where, meshes.data_mesh(here), chip)
    where = name or DEFAULT
    jax.config.update("jax_platforms", "cpu")  # the chips planned for are not this machine's
    found = devices(where)
    return Target(where, meshes.data_mesh(found), chips.chip_of(where, found))


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
            "write the topology like v5e:2x4, v6e:2x4, v4:2x2x1, v5p:2x2x1 or tpu7x:2x2x1"
        ) from error

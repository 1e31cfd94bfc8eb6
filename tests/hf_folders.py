"""The oracle folders that transformers wrote: copies to spoil, and the logits to expect."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from gemma_grpo import model as gemma3
from gemma_grpo.weights.assemble import assemble
from gemma_grpo.weights.source import Source

FOLDERS = Path(__file__).parent / "oracles" / "hf_folders"


def copy_of(name: str, out: Path) -> Path:
    """A copy of an oracle folder, at a path that is not there yet."""
    shutil.copytree(FOLDERS / name, out)
    return out


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of a JSON object in a file; None takes the field away."""
    content = json.loads(path.read_text()) | changes
    kept = {name: value for name, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a folder, by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    return {k: v for file in files for k, v in safetensors.numpy.load_file(file).items()}


def save_as_one(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Puts these tensors in place of the folder's, in one file."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors")


def logits_of(source: Source, ids_BL: np.ndarray) -> np.ndarray:
    """Our logits of a checkpoint in float32."""
    graphdef, like = gemma3.abstract(source.config)
    params = assemble(source, like, dtype=jnp.float32, sharding=None)

    @jax.jit
    def run(params, ids_BL):
        model = nnx.merge(graphdef, params)
        hidden_BLD, _ = gemma3.forward(model, ids_BL, jnp.ones(ids_BL.shape, bool))
        return model.logits(hidden_BLD)

    return np.asarray(run(params, ids_BL))

"""What a frozen base in int8 (QLoRA's idea) would save and cost, by qwix on the real Gemma 3 270M.

pip install qwix && python -m benchmarks.int8_base

Weights are rounded by `qwix.quantize` (absmax, one scale for each layer and output) and multiplied
out again: the error is that of int8 weights alone, computed with in float32. A row for each form:
bytes of the base here and of Gemma 3 1B's, and how far the next-token distribution moves from the
float32 weights' on worked solutions of the curriculum. bfloat16, what LoRA trains over today, is
the yardstick.
"""

from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from benchmarks.timing import print_row
from gemma_grpo import model as gemma3
from gemma_grpo.data import curriculum
from gemma_grpo.model import CONFIGS, Params
from gemma_grpo.text import padding
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assemble, open_source, tokenizer_path
from gemma_grpo.weights.names import by_path

NUM_TEXTS = 32


def main() -> None:
    """Print the rows."""
    source = open_source("gemma3-270m")
    graphdef, shapes = gemma3.abstract(source.config)
    params = assemble(source, shapes, dtype="float32", sharding=None)
    tokenizer = Tokenizer(tokenizer_path(source))
    texts = [
        tokenizer.encode(f"{problem.prompt}\n{problem.completion}")
        for problem in curriculum.problems("test", NUM_TEXTS, seed=0)
    ]
    ids_BL, mask_BL = padding.pad_right(texts, length=max(map(len, texts)), pad_id=0)

    @jax.jit
    def log_probs(params: Params) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return jax.nn.log_softmax(model.logits(gemma3.forward(model, ids_BL, mask_BL)[0]))

    exact = np.asarray(log_probs(params))[mask_BL]
    forms: dict[str, Callable[[str], str]] = {
        "bfloat16": lambda name: "bfloat16",
        "int8 blocks": lambda name: "bfloat16" if name == "embedding" else "int8",
        "int8 blocks and embedding": lambda name: "int8",
    }
    for form, dtype_of in forms.items():
        near = np.asarray(log_probs(_rounded(params, dtype_of)))[mask_BL]
        print_row(
            benchmark="int8_base",
            qwix=metadata.version("qwix"),
            model="gemma3-270m",
            form=form,
            dtype="float32",  # computed in, with weights rounded to the form
            texts=NUM_TEXTS,
            length=ids_BL.shape[1],
            tokens=len(near),
            kl_nats_mean=float(np.sum(np.exp(exact) * (exact - near), axis=-1).mean()),
            same_first_choice=float((near.argmax(-1) == exact.argmax(-1)).mean()),
            base_gb=round(_size(shapes, dtype_of) / 1e9, 3),
            base_gb_of_1b=round(_size(gemma3.abstract(CONFIGS["gemma3-1b"])[1], dtype_of) / 1e9, 3),
        )


def _kept(name: str, dtype: str) -> str:
    """Norm gains stay in bfloat16: they are few, and scale everything."""
    return "bfloat16" if name.endswith("scale") else dtype


def _rounded(params: Params, dtype_of: Callable[[str], str]) -> Params:
    """The float32 parameters after a round trip through their form."""

    def round_trip(name: str, leaf: jax.Array) -> jax.Array:
        if _kept(name, dtype_of(name)) == "bfloat16":
            return leaf.astype(jnp.bfloat16).astype(jnp.float32)
        outputs = (0,) if name == "embedding" else _output_axes(name, leaf.ndim)
        array = qwix.quantize(leaf, jnp.int8, channelwise_axes=outputs)
        return qwix.dequantize(array).astype(jnp.float32)

    leaves = [round_trip(name, leaf) for name, leaf in by_path(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _output_axes(name: str, ndim: int) -> tuple[int, ...]:
    """Axes with scales of their own: the layer, and what a projection gives out."""
    if name.endswith("o_proj"):
        return (0, ndim - 1)
    return (0, *range(2, ndim))


def _size(shapes: Params, dtype_of: Callable[[str], str]) -> float:
    """Bytes, an int8 array's float32 scales (one an output) left out: below 0.4 %."""
    return sum(
        leaf.size * jnp.dtype(_kept(name, dtype_of(name))).itemsize
        for name, leaf in by_path(shapes).items()
    )


if __name__ == "__main__":
    main()

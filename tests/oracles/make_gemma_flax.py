"""Writes gemma_flax/: checkpoints as Google's own `gemma` library makes them, and its logits.

The suite reads the files only, so it needs neither gemma nor flax.linen. To write them again:

    python -m venv flax && flax/bin/pip install gemma==3.3.0 kauldron==1.2.2 jax==0.7.2 \
        flax==0.11.2 orbax-checkpoint==0.11.24 typeguard==4.4.4
    flax/bin/python tests/oracles/make_gemma_flax.py

(Newer kauldron lacks what gemma 3.3.0 asks of it.) It takes seconds on a CPU. One tiny model, drawn
here; the parameter tree, its flat form, the saving and the forward pass are the library's:

    nested/         float32, the tree of `model.init`
    flat/           bfloat16, keys such as "transformer/layer_0/attn/q_einsum", as released, and
                    a vision tower beside it
    logits.npz      ids [B, L] and the logits [B, L, V] of both, computed in float32
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gemma import gm
from gemma.gm.ckpts import _checkpoint
from gemma.gm.nn import _config
from gemma.gm.nn._gemma import GEMMA3_ATTENTION_PATTERN

OUT = Path(__file__).parent.absolute() / "gemma_flax"
CONFIG = _config.TransformerConfig(
    final_logit_softcap=None,
    num_embed=37,
    embed_dim=12,
    hidden_dim=22,
    num_heads=4,
    head_dim=6,
    num_kv_heads=2,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    use_qk_norm=True,
    attention_types=_config.make_attention_layers_types(GEMMA3_ATTENTION_PATTERN, num_layers=7),
    query_pre_attn_norm=_config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
    attn_logits_soft_cap=None,
    sliding_window_size=4,
    transpose_gating_einsum=True,
    local_base_frequency=10_000,
    global_base_frequency=1_000_000,
    global_scale_factor=8.0,
    vision_encoder=None,
)


def draw(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Norm gains well away from 1, projections that keep the size of what they take."""
    scale = 0.3 if len(shape) == 1 else shape[-2] ** -0.5
    return (generator.standard_normal(shape) * scale).astype(np.float32)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    generator = np.random.default_rng(21)
    ids_BL = generator.integers(0, CONFIG.num_embed, (2, 17)).astype(np.int32)
    model = gm.nn.Transformer(config=CONFIG, dtype=jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(ids_BL)))["params"]
    params = jax.tree.map(lambda leaf: draw(leaf.shape, generator), shapes)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    gm.ckpts.save_params(params, OUT / "nested", wait_until_finished=True)
    flat = _checkpoint._nested_to_flat(rounded)
    flat["SigLiPFromPatches_0/siglip_encoder/pos_embedding"] = {"w": jnp.ones(3, jnp.bfloat16)}
    flat["transformer/embedder/mm_input_projection"] = {"w": jnp.ones((3, 12), jnp.bfloat16)}
    flat["transformer/embedder/mm_soft_embedding_norm"] = {"scale": jnp.ones(3, jnp.bfloat16)}
    gm.ckpts.save_params(flat, OUT / "flat", wait_until_finished=True)
    logits = {
        name: model.apply({"params": jax.tree.map(jnp.float32, tree)}, jnp.asarray(ids_BL)).logits
        for name, tree in (("nested", params), ("flat", rounded))
    }
    np.savez_compressed(OUT / "logits.npz", ids=ids_BL, **logits)
    print({name: float(np.abs(array).max()) for name, array in logits.items()})


if __name__ == "__main__":
    main()

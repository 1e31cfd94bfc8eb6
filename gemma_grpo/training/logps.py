"""Log-probs of given completions under given parameters.

The head is applied only where a completion token is predicted.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemma_grpo import model as gemma3
from gemma_grpo.kernels.lm_head_logps import lm_head_logps


def batch_logps(
    model: gemma3.Gemma3,
    batch: dict[str, jax.Array],
    *,
    temperature: float = 1.0,
    remat: gemma3.Remat = "none",
    gather: gemma3.Gather | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of each completion token, and the entropy of the distribution it was drawn from.

    The prompt is run once for its group. Values on padding mean nothing; mask them.

    Args:
        batch: `prompt_ids` and `prompt_mask` [P, S], left-padded; `completion_ids` and
            `completion_mask` [B, T], right-padded, group-major; B is a multiple of P. May have
            `dropout_keys`, raw key data with a row for each prompt: adapters drop inputs by them.
            May have `slots`, [P, X] (see `packing`): all b*T + t that hold tokens, in order, and
            B*T as filler: only these slots are computed.
        temperature: of the distribution; the sampler's, so that both are of the same one.
        remat, gather: see `model.forward_groups`.
    """
    completion_ids_BT = batch["completion_ids"]
    (B, T), P = completion_ids_BT.shape, len(batch["prompt_ids"])
    rows = gemma3.Rows((B, T))
    if "slots" in batch:
        rows = gemma3.Packed.of(batch["slots"].reshape(-1), (B, T))
    keys_P = keys_B = None
    if "dropout_keys" in batch:
        keys_P = jax.random.wrap_key_data(batch["dropout_keys"])
        keys_B = jax.vmap(lambda key: jax.random.split(key, B // P))(keys_P).reshape(-1)
    hidden_PSD, hidden_1XD = gemma3.forward_groups(
        model,
        batch["prompt_ids"],
        batch["prompt_mask"],
        completion_ids_BT,
        batch["completion_mask"],
        remat=remat,
        gather=gather,
        dropout_keys_P=keys_P,
        dropout_keys_B=keys_B,
        rows=rows,
    )
    # A token is predicted one place earlier, a completion's first by its prompt's last slot.
    first_BD = jnp.repeat(hidden_PSD[:, -1], B // P, axis=0)
    before_1XD = jnp.roll(hidden_1XD, 1, axis=1).at[0, rows.firsts()].set(first_BD, mode="drop")
    logps_1X, entropy_1X = token_logps(
        model, before_1XD, rows.pack(completion_ids_BT), temperature=temperature
    )
    return rows.unpack(logps_1X), rows.unpack(entropy_1X)


def token_logps(
    model: gemma3.Gemma3,
    hidden_BTD: Float[Array, "B T D"],
    ids_BT: Int[Array, "B T"],
    *,
    temperature: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of `ids` under softmax(head(hidden) / temperature), and its entropy, in float32.

    The entropy carries no gradient. The full logits are never stored.
    """
    tokens = lm_head_logps(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        model.embedding[...],
        ids_BT.reshape(-1),
        temperature=temperature,
    )
    return tokens.logps.reshape(ids_BT.shape), tokens.entropy.reshape(ids_BT.shape)

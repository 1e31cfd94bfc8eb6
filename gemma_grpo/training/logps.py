"""Log-probs of given completions under given parameters. Knows no loss, reward or sampler.

The head is applied where the completion is predicted and nowhere else.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gemma_grpo import model as gemma3
from gemma_grpo.kernels.lm_head_logps import lm_head_logps


def completion_logps(
    model: gemma3.Gemma3,
    prompt_ids_PS: Int[Array, "P S"],
    prompt_mask_PS: Bool[Array, "P S"],
    completion_ids_BT: Int[Array, "B T"],
    completion_mask_BT: Bool[Array, "B T"],
    *,
    temperature: float = 1.0,
    remat: gemma3.Remat = "none",
    gather: gemma3.Gather | None = None,
    dropout_keys_P: Key[Array, " P"] | None = None,
    slots_X: Int[Array, " X"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of each completion token, and the entropy of the distribution it was drawn from.

    The prompt is run once for its group. Values on padding mean nothing; mask them.

    Args:
        prompt_ids_PS: left-padded.
        completion_ids_BT: right-padded, group-major; B is a multiple of P.
        temperature: of the distribution; the sampler's, so that both are of the same one.
        remat, gather: see `model.forward_groups`.
        dropout_keys_P: a key for each group, for adapters with dropout; None drops nothing.
        slots_X: all b*T + t that hold tokens, in order, and B*T to fill up: work is done for these
            alone. None works for all slots.
    """
    B, T = completion_ids_BT.shape
    G = B // prompt_ids_PS.shape[0]
    rows = gemma3.Rows((B, T)) if slots_X is None else gemma3.Packed.of(slots_X, (B, T))
    dropout_keys_B = None
    if dropout_keys_P is not None:
        dropout_keys_B = jax.vmap(lambda key: jax.random.split(key, G))(dropout_keys_P).reshape(-1)
    hidden_PSD, hidden_1XD = gemma3.forward_groups(
        model,
        prompt_ids_PS,
        prompt_mask_PS,
        completion_ids_BT,
        completion_mask_BT,
        remat=remat,
        gather=gather,
        dropout_keys_P=dropout_keys_P,
        dropout_keys_B=dropout_keys_B,
        rows=rows,
    )
    # A token is predicted one place earlier, a completion's first by its prompt's last slot.
    first_BD = jnp.repeat(hidden_PSD[:, -1], G, axis=0)
    before_1XD = jnp.roll(hidden_1XD, 1, axis=1).at[0, rows.firsts()].set(first_BD, mode="drop")
    logps_1X, entropy_1X = token_logps(
        model, before_1XD, rows.pack(completion_ids_BT), temperature=temperature
    )
    return rows.unpack(logps_1X), rows.unpack(entropy_1X)


def batch_logps(
    model: gemma3.Gemma3,
    batch: dict[str, jax.Array],
    *,
    temperature: float = 1.0,
    remat: gemma3.Remat = "none",
    gather: gemma3.Gather | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`completion_logps` of a batch of training, by its arrays' names. If it has `dropout_keys`
    (raw words, a row for each prompt), adapters drop inputs by them; if it has `slots` (cut into as
    many rows as there are prompts: `packing`), work is done for these slots alone."""
    keys_P, slots_PX = batch.get("dropout_keys"), batch.get("slots")
    return completion_logps(
        model,
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["completion_ids"],
        batch["completion_mask"],
        temperature=temperature,
        remat=remat,
        gather=gather,
        dropout_keys_P=None if keys_P is None else jax.random.wrap_key_data(keys_P),
        slots_X=None if slots_PX is None else slots_PX.reshape(-1),
    )


def token_logps(
    model: gemma3.Gemma3,
    hidden_BTD: Float[Array, "B T D"],
    ids_BT: Int[Array, "B T"],
    *,
    temperature: float,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of `ids` under softmax(head(hidden) / temperature), and its entropy, in float32.

    The entropy carries no gradient. The logits never exist as a whole.
    """
    tokens = lm_head_logps(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        model.embedding[...],
        ids_BT.reshape(-1),
        temperature=temperature,
    )
    return tokens.logps.reshape(ids_BT.shape), tokens.entropy.reshape(ids_BT.shape)

"""Log-probs of given completions under given parameters. Knows no loss, reward or sampler.

The head is applied where the completion is predicted and nowhere else, a chunk of tokens at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gemma_grpo import model as gemma3


def completion_logps(
    model: gemma3.Gemma3,
    prompt_ids_PS: Int[Array, "P S"],
    prompt_mask_PS: Bool[Array, "P S"],
    completion_ids_BT: Int[Array, "B T"],
    completion_mask_BT: Bool[Array, "B T"],
    *,
    temperature: float = 1.0,
    logits_chunk: int = 0,
    remat: bool = False,
    dropout_keys_P: Key[Array, " P"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of each completion token, and the entropy of the distribution it was drawn from.

    The prompt is run once for its group. Values on padding mean nothing; mask them.

    Args:
        prompt_ids_PS: left-padded.
        completion_ids_BT: right-padded, group-major; B is a multiple of P.
        temperature: of the distribution; the sampler's, so that both are of the same one.
        logits_chunk: tokens whose logits exist at a time; 0 takes all at once.
        remat: recompute blocks in the backward pass.
        dropout_keys_P: a key for each group, for adapters with dropout; None drops nothing.
    """
    G = completion_ids_BT.shape[0] // prompt_ids_PS.shape[0]
    dropout_keys_B = None
    if dropout_keys_P is not None:
        dropout_keys_B = jax.vmap(lambda key: jax.random.split(key, G))(dropout_keys_P).reshape(-1)
    hidden_PSD, prompt_kv = gemma3.forward(
        model, prompt_ids_PS, prompt_mask_PS, remat=remat, dropout_keys_B=dropout_keys_P
    )
    hidden_BTD = gemma3.extend(
        model,
        completion_ids_BT,
        completion_mask_BT,
        prompt_kv,
        prompt_mask_PS,
        remat=remat,
        dropout_keys_B=dropout_keys_B,
    )
    # A token is predicted one slot earlier: the first by the prompt's last, the last predicts none.
    first_B1D = jnp.repeat(hidden_PSD[:, -1:], G, axis=0)
    before_BTD = jnp.concatenate([first_B1D, hidden_BTD[:, :-1]], axis=1)
    return token_logps(
        model, before_BTD, completion_ids_BT, temperature=temperature, logits_chunk=logits_chunk
    )


def batch_logps(
    model: gemma3.Gemma3,
    batch: dict[str, jax.Array],
    *,
    temperature: float = 1.0,
    logits_chunk: int = 0,
    remat: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """`completion_logps` of a batch of training, by its arrays' names. If it has `dropout_keys`
    (raw words, a row for each prompt), adapters drop inputs by them."""
    keys_P = batch.get("dropout_keys")
    return completion_logps(
        model,
        batch["prompt_ids"],
        batch["prompt_mask"],
        batch["completion_ids"],
        batch["completion_mask"],
        temperature=temperature,
        logits_chunk=logits_chunk,
        remat=remat,
        dropout_keys_P=None if keys_P is None else jax.random.wrap_key_data(keys_P),
    )


def token_logps(
    model: gemma3.Gemma3,
    hidden_BTD: Float[Array, "B T D"],
    ids_BT: Int[Array, "B T"],
    *,
    temperature: float,
    logits_chunk: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of `ids` under softmax(head(hidden) / temperature), and its entropy, in float32.

    Chunks are recomputed in the backward pass, so that no more than one chunk's logits exist.
    """
    B, T, D = hidden_BTD.shape

    def of_chunk(chunk):
        hidden_XD, ids_X = chunk
        logps_XV = jax.nn.log_softmax(model.logits(hidden_XD) / temperature, axis=-1)
        logps_X = jnp.take_along_axis(logps_XV, ids_X[:, None], axis=-1)[:, 0]
        return logps_X, -jnp.sum(jnp.exp(logps_XV) * logps_XV, axis=-1)

    flat = hidden_BTD.reshape(-1, D), ids_BT.reshape(-1)
    if logits_chunk == 0 or logits_chunk >= B * T:
        logps, entropy = of_chunk(flat)
        return logps.reshape(B, T), entropy.reshape(B, T)
    padding = -(B * T) % logits_chunk
    chunks = jax.tree.map(
        lambda x: jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(
            -1, logits_chunk, *x.shape[1:]
        ),
        flat,
    )
    logps, entropy = jax.lax.map(jax.checkpoint(of_chunk), chunks)
    return logps.reshape(-1)[: B * T].reshape(B, T), entropy.reshape(-1)[: B * T].reshape(B, T)

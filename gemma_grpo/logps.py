"""Log-probs of given completions under given parameters. Knows no loss, reward or sampler.

The head is applied where the completion is predicted and nowhere else, a chunk of tokens at a time.
"""

from functools import partial

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

    The entropy carries no gradient. With chunks, no more than one chunk's logits ever exist.
    """
    B, T, D = hidden_BTD.shape
    embedding_VD = model.embedding[...]
    hidden_XD, ids_X = hidden_BTD.reshape(-1, D), ids_BT.reshape(-1)
    if logits_chunk == 0 or logits_chunk >= B * T:
        logps_XV = _log_softmax(hidden_XD, embedding_VD, temperature)
        logps_X, entropy_X = _pick(logps_XV, ids_X), _entropy(logps_XV)
    else:
        padding = -(B * T) % logits_chunk
        hidden_NXD = jnp.pad(hidden_XD, ((0, padding), (0, 0))).reshape(-1, logits_chunk, D)
        ids_NX = jnp.pad(ids_X, (0, padding)).reshape(-1, logits_chunk)
        logps_NX, entropy_NX = _chunked(temperature, hidden_NXD, embedding_VD, ids_NX)
        logps_X, entropy_X = logps_NX.reshape(-1)[: B * T], entropy_NX.reshape(-1)[: B * T]
    return logps_X.reshape(B, T), jax.lax.stop_gradient(entropy_X).reshape(B, T)


def _log_softmax(hidden_XD: jax.Array, embedding_VD: jax.Array, temperature: float) -> jax.Array:
    logits_XV = jnp.einsum("xd,vd->xv", hidden_XD, embedding_VD, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits_XV / temperature, axis=-1)


def _pick(logps_XV: jax.Array, ids_X: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logps_XV, ids_X[:, None], axis=-1)[:, 0]


def _entropy(logps_XV: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(logps_XV) * logps_XV, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    temperature: float, hidden_NXD: jax.Array, embedding_VD: jax.Array, ids_NX: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probs and entropies [N, X], chunk after chunk."""

    def of_chunk(chunk):
        hidden_XD, ids_X = chunk
        logps_XV = _log_softmax(hidden_XD, embedding_VD, temperature)
        return _pick(logps_XV, ids_X), _entropy(logps_XV)

    return jax.lax.map(of_chunk, (hidden_NXD, ids_NX))


def _chunked_forward(temperature, hidden_NXD, embedding_VD, ids_NX):
    """A log-prob's gradient for its own hidden state, (E[id] - softmax E) / temperature, is known
    up to a factor as soon as its logits are: it is made here and kept, so that nothing is
    recomputed for it. Only an embedding that is trained needs the logits again."""
    embedding_is_trained = embedding_VD.perturbed
    hidden_NXD, embedding_VD, ids_NX = hidden_NXD.value, embedding_VD.value, ids_NX.value

    def of_chunk(chunk):
        hidden_XD, ids_X = chunk
        logps_XV = _log_softmax(hidden_XD, embedding_VD, temperature)
        probs_XV = jnp.exp(logps_XV).astype(embedding_VD.dtype)
        expected_XD = jnp.einsum(
            "xv,vd->xd", probs_XV, embedding_VD, preferred_element_type=jnp.float32
        )
        towards_XD = (embedding_VD[ids_X] - expected_XD) / temperature
        return _pick(logps_XV, ids_X), _entropy(logps_XV), towards_XD.astype(hidden_XD.dtype)

    logps_NX, entropy_NX, towards_NXD = jax.lax.map(of_chunk, (hidden_NXD, ids_NX))
    again = (hidden_NXD, embedding_VD, ids_NX) if embedding_is_trained else None
    return (logps_NX, entropy_NX), (towards_NXD, again)


def _chunked_backward(temperature, kept, cotangents):
    towards_NXD, again = kept
    cotangent_NX = cotangents[0]
    hidden_cotangent_NXD = (cotangent_NX[..., None] * towards_NXD).astype(towards_NXD.dtype)
    if again is None:
        return hidden_cotangent_NXD, None, None
    hidden_NXD, embedding_VD, ids_NX = again

    def add_chunk(total_VD, chunk):
        hidden_XD, ids_X, cotangent_X = chunk
        probs_XV = jnp.exp(_log_softmax(hidden_XD, embedding_VD, temperature))
        weighted_XD = hidden_XD * (cotangent_X / temperature)[:, None]
        total_VD -= jnp.einsum(
            "xv,xd->vd",
            probs_XV.astype(hidden_XD.dtype),
            weighted_XD.astype(hidden_XD.dtype),
            preferred_element_type=jnp.float32,
        )
        return total_VD.at[ids_X].add(weighted_XD.astype(jnp.float32)), None

    zeros_VD = jnp.zeros(embedding_VD.shape, jnp.float32)
    total_VD, _ = jax.lax.scan(add_chunk, zeros_VD, (hidden_NXD, ids_NX, cotangent_NX))
    return hidden_cotangent_NXD, total_VD.astype(embedding_VD.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward, symbolic_zeros=True)

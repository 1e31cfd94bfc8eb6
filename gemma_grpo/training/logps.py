"""Log-probs of given completions under given parameters.

The head is applied only where a completion token is predicted.
"""

import jax
from jaxtyping import Array, Bool, Float, Int

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

    A prompt is run once for its completions. Values on padding mean nothing; mask them.

    Args:
        batch: `prompt_ids` and `prompt_mask` [P, S], left-padded; `completion_ids` and
            `completion_mask` [B, T], right-padded, group-major; B is a multiple of P. Optional:
            `slots` [N] (see `packing`), the only slots to compute; `dropout_keys`, a row per
            prompt, and `completion_dropout_keys`, a row per completion, raw key data for the
            adapters' dropout.
        temperature: the sampler's, so that both log-probs are of the same distribution.
        remat, gather: see `model.forward_groups`. Without remat the head's logits are kept too, if
            the embedding is trained.
    """
    prompts = batch["prompt_ids"], batch["prompt_mask"]
    completions = batch["completion_ids"], batch["completion_mask"]
    (P, S), (B, T) = batch["prompt_ids"].shape, batch["completion_ids"].shape
    rows = gemma3.Rows((P, S), (B, T))
    if "slots" in batch:
        rows = gemma3.Packed.of(batch["slots"].reshape(-1), (P, S), (B, T))
    keys = None
    if "dropout_keys" in batch:
        names = "dropout_keys", "completion_dropout_keys"
        keys = tuple(jax.random.wrap_key_data(batch[name], impl=gemma3.PRNG) for name in names)
    hidden_1ND = gemma3.forward_groups(
        model, (*prompts, *completions), rows, remat=remat, gather=gather, dropout_keys=keys
    )
    logps_1M, entropy_1M = token_logps(
        model,
        rows.predictors(hidden_1ND),
        rows.head_places(batch["completion_ids"]),
        temperature=temperature,
        wanted_BT=rows.are_predicted(),
        keep_logits=remat == "none",
    )
    return rows.head_slots(logps_1M), rows.head_slots(entropy_1M)


def token_logps(
    model: gemma3.Gemma3,
    hidden_BTD: Float[Array, "B T D"],
    ids_BT: Int[Array, "B T"],
    *,
    temperature: float,
    wanted_BT: Bool[Array, "B T"] | None = None,
    keep_logits: bool = False,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-prob of `ids` under softmax(head(hidden) / temperature), and its entropy, in float32.

    The entropy carries no gradient. Where a token is not `wanted`, the values mean nothing. The
    logits of the whole vocabulary are stored for the backward pass only if `keep_logits`.
    """
    tokens = lm_head_logps(
        hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
        model.embedding[...],
        ids_BT.reshape(-1),
        temperature=temperature,
        wanted_X=None if wanted_BT is None else wanted_BT.reshape(-1),
        keep_logits=keep_logits,
    )
    return tokens.logps.reshape(ids_BT.shape), tokens.entropy.reshape(ids_BT.shape)

"""Prompts [P, S] and completions [B, T] as one row of tokens, and back.

    Rows    every slot in order, padding included
    Packed  the slots that hold tokens, as `slots` lists them

Everything that works on single tokens (projections, MLP, norms, the head) works on this row, and
so does attention (`model/groups.py`). This is "unpadding": Zeng et al., "Boosting Distributed
Training Performance of the Unpadded BERT Model", arXiv 2208.08124.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from gemma_grpo.kernels.packed_attention import Segments


@dataclass(frozen=True)
class Rows:
    """Every slot: z = p*S + s in a prompt, then P*S + b*T + t in a completion.

    Attributes:
        prompts: (P, S).
        completions: (B, T); B is a multiple of P, rows are group-major.
    """

    prompts: tuple[int, int]
    completions: tuple[int, int]

    def pack(
        self, x_PS: Shaped[Array, "P S *rest"], x_BT: Shaped[Array, "B T *rest"]
    ) -> Shaped[Array, "1 N *rest"]:
        """The slots as one row."""
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        return jnp.concatenate([flat(x_PS), flat(x_BT)])[None]

    def unpack(
        self, x_1N: Shaped[Array, "1 N *rest"]
    ) -> tuple[Shaped[Array, "P S *rest"], Shaped[Array, "B T *rest"]]:
        """Undoes `pack` on tokens."""
        first = self.prompts[0] * self.prompts[1]
        rest = x_1N.shape[2:]
        prompts, completions = x_1N[0, :first], x_1N[0, first:]
        return prompts.reshape(*self.prompts, *rest), completions.reshape(*self.completions, *rest)

    def places(self) -> Int[Array, " Z"]:
        """The place of each slot in the row."""
        (P, S), (B, T) = self.prompts, self.completions
        return jnp.arange(P * S + B * T)

    def segments(
        self, prompt_mask_PS: Bool[Array, "P S"], completion_mask_BT: Bool[Array, "B T"]
    ) -> Segments:
        """The segment of each place in the row, for the attention kernel."""
        (P, S), (B, T) = self.prompts, self.completions
        places_Z, length_P = self.places(), prompt_mask_PS.sum(axis=1)
        prompt_P = jnp.take(places_Z, jnp.arange(1, P + 1) * S - length_P, mode="clip")
        completion_B = places_Z[P * S :: T]
        of_group = lambda x_P: jnp.repeat(x_P, B // P)[:, None]
        full = lambda x, shape: jnp.broadcast_to(x, shape)
        position_BT = of_group(length_P) + jnp.arange(T)[None]
        packed = (
            self.pack(prompt_mask_PS, completion_mask_BT),
            self.pack(positions(prompt_mask_PS), position_BT),
            self.pack(full(prompt_P[:, None], (P, S)), full(completion_B[:, None], (B, T))),
            self.pack(jnp.zeros((P, S), int), full(of_group(prompt_P), (B, T))),
            self.pack(jnp.zeros((P, S), int), full(of_group(prompt_P + length_P), (B, T))),
        )
        return Segments(*(x_1N[0] for x_1N in packed))

    def predictors(self, hidden_1ND: Float[Array, "1 N D"]) -> Float[Array, "1 M D"]:
        """The hidden states that the head is applied to, M = B*T: for each completion token that of
        the token before it; for the first one, that of the prompt's last token."""
        hidden_PSD, hidden_BTD = self.unpack(hidden_1ND)
        last_BD = jnp.repeat(hidden_PSD[:, -1], self.completions[0] // self.prompts[0], axis=0)
        before_BTD = jnp.concatenate([last_BD[:, None], hidden_BTD[:, :-1]], axis=1)
        return before_BTD.reshape(1, -1, before_BTD.shape[-1])

    def are_predicted(self) -> Bool[Array, "1 M"] | None:
        """Whether each place of `predictors` predicts a completion slot; None if all do."""
        return None

    def head_places(self, x_BT: Shaped[Array, "B T"]) -> Shaped[Array, "1 M"]:
        """Values of completion slots at the places of `predictors`."""
        return x_BT.reshape(1, -1)

    def head_slots(self, x_1M: Shaped[Array, "1 M"]) -> Shaped[Array, "B T"]:
        """Undoes `head_places` on tokens."""
        return x_1M.reshape(self.completions)


@dataclass(frozen=True)
class Packed(Rows):
    """The slots that hold tokens. Those of one prompt, or of one completion, must be adjacent.

    Attributes:
        slots: the slot at each place; Z, the number of slots, where the row is empty.
        place_of: the place of each slot; N where it holds no token.
    """

    slots: Int[Array, " N"]
    place_of: Int[Array, " Z"]

    @classmethod
    def of(
        cls, slots_N: Int[Array, " N"], prompts: tuple[int, int], completions: tuple[int, int]
    ) -> "Packed":
        """From the slots alone; those below Z must be distinct."""
        N, Z = len(slots_N), prompts[0] * prompts[1] + completions[0] * completions[1]
        place_Z = jnp.full(Z, N).at[slots_N].set(jnp.arange(N), mode="drop")
        return cls(prompts, completions, slots_N, place_Z)

    def pack(self, x_PS, x_BT):
        """Slots without a token are left out; 0 where the row is empty."""
        return _take(super().pack(x_PS, x_BT)[0], self.slots, self.place_of)[None]

    def unpack(self, x_1N):
        """Undoes `pack` on tokens; 0 in all other slots."""
        return super().unpack(_take(x_1N[0], self.place_of, self.slots)[None])

    def places(self):
        return self.place_of

    def predictors(self, hidden_1ND):
        """M = N: every place; those of prompts predict no completion token."""
        (P, S), (B, T) = self.prompts, self.completions
        first_B = self.place_of[P * S :: T]
        last_B = jnp.repeat(self.place_of[S - 1 : P * S : S], B // P)
        before_1ND = jnp.roll(hidden_1ND, 1, axis=1)
        last_BD = jnp.take(hidden_1ND[0], last_B, axis=0, mode="clip")
        return before_1ND.at[0, first_B].set(last_BD, mode="drop")

    def are_predicted(self):
        (P, S), (B, T) = self.prompts, self.completions
        return ((self.slots >= P * S) & (self.slots < P * S + B * T))[None]

    def head_places(self, x_BT):
        return self.pack(jnp.zeros(self.prompts, x_BT.dtype), x_BT)

    def head_slots(self, x_1M):
        return self.unpack(x_1M)[1]


def positions(mask_BL: Bool[Array, "B L"]) -> Int[Array, "B L"]:
    """The position of each token in its row, padding not counted."""
    return jnp.maximum(jnp.cumsum(mask_BL, axis=1) - 1, 0)


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[index], 0 where the index is past the end. With the inverse index the gradient is such a
    gather too, where autodiff would scatter-add row by row."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _forward(x, index, inverse):
    return _take(x, index, inverse), (index, inverse)


def _backward(kept, cotangent):
    index, inverse = kept
    return _take(cotangent, inverse, index), None, None


_take.defvjp(_forward, _backward)

"""A batch cut into packs of a fixed number of tokens, so that every step has the same array shapes.

A *pack* is what a device computes in one pass: a row of N tokens that holds prompts and some of
their completions. A group's completions may lie in different packs, and on different devices; each
pack runs the prompts that its completions continue. A step takes as many packs as its completions
need, the same number on every device. Where large packs have 1024 tokens or more, small ones of a
quarter of that leave few places empty.

The arrays of a pack are padded: p prompt rows [p, S], g completion rows for each, [p*g, T], and
`slots` [N]: which of the pack's p*S + p*g*T slots stands at each place of the row (`model.packed`).
"""

import heapq
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from gemma_grpo.errors import UserError

Arrays = dict[str, np.ndarray]
OF_PROMPTS = ("prompt_ids", "prompt_mask", "dropout_keys")  # P rows; all other arrays have B
SMALL_FROM = 256  # the fewest tokens of a small pack: the block size of the TPU kernel
NEAR = 1 / 256  # of a step's places; with 64 large packs a device or fewer, one pack is more


@dataclass(frozen=True)
class PackShape:
    """The packs of one size.

    Attributes:
        tokens: N, of the row; 0 computes every slot of the padded rows, tokens or not.
        num_prompts: p, prompt rows.
        rows_each: g, completion rows of each prompt.
        most: the most packs of this size that a device takes in one step.
    """

    tokens: int
    num_prompts: int
    rows_each: int
    most: int


@dataclass(frozen=True)
class Packing:
    """How a stage's batches are cut.

    Attributes:
        num_devices: each takes the same number of packs.
        max_prompt_length: S.
        max_completion_length: T.
        shapes: the sizes of pack, the largest first.
    """

    num_devices: int
    max_prompt_length: int
    max_completion_length: int
    shapes: tuple[PackShape, ...]


def make_packing(
    num_prompts: int, num_generations: int, pack_tokens: int, lengths: tuple[int, int], devices: int
) -> Packing:
    """The packing of batches of `num_prompts` (P) groups of `num_generations` (G).

    Args:
        pack_tokens: N of the large packs, raised to S + T if that is more; 0 gives each device its
            share of the groups as one pack of all slots.
        lengths: (S, T), the most tokens of a prompt and of a completion.
        devices: the number that share a batch.

    Raises:
        UserError: without packs the groups do not divide over the devices.
    """
    P, G, (S, T) = num_prompts, num_generations, lengths
    if not pack_tokens:
        if P % devices:
            raise UserError(
                f"{P} prompts a step do not divide over {devices} devices: use a multiple of "
                f"{devices}, or set pack_tokens"
            )
        return Packing(devices, S, T, (PackShape(0, P // devices, G, 1),))
    pack_tokens = max(pack_tokens, S + T)
    # Rows for completions of a quarter of T, and prompts for twice as many groups as these.
    prompts_in = lambda tokens: min(P, -(-8 * tokens // (S + G * T)))
    packs_per_group = -(-G // _completions_in(pack_tokens, G, lengths))
    most = -(-P * packs_per_group // devices)
    shapes = [PackShape(pack_tokens, prompts_in(pack_tokens), G, most)]
    small = pack_tokens // 4
    if small >= SMALL_FROM:
        shapes.append(PackShape(small, prompts_in(small), G, 3))
    return Packing(devices, S, T, tuple(shapes))


def pack(batch: Arrays, packing: Packing) -> tuple[Arrays, ...]:
    """The batch's rows in packs: the arrays of each pack shape, device by device and pack by pack.

    Besides the batch's own arrays, each shape has `slots` [devices * most, N], p*S + p*g*T where a
    place is empty, and `count` [devices], how many of the packs are used. Unused rows are 0. With
    `pack_tokens` 0 there is neither, and the rows keep their order.

    Args:
        batch: arrays of P, or of B = P*G, rows: `prompt_ids` and `prompt_mask` [P, S],
            `completion_ids` and `completion_mask` [B, T], and others.
    """
    if not packing.shapes[0].tokens:
        return (batch,)
    prompt_tokens_P = batch["prompt_mask"].sum(axis=1)
    tokens_B = batch["completion_mask"].sum(axis=1)
    counts, bins_B = _deal_step(tokens_B, prompt_tokens_P, packing)
    packs, first, devices = [], 0, packing.num_devices
    for shape, count in zip(packing.shapes, counts, strict=True):
        # Bins are numbered shape by shape, and within one pack by pack over the devices.
        places = np.full((devices, shape.most), -1)
        places[:, :count] = first + np.arange(count * devices).reshape(count, devices).T
        packs.append(_arrays(batch, bins_B, places.reshape(-1), shape))
        packs[-1]["count"] = np.full(devices, count, np.int32)
        first += count * devices
    return tuple(packs)


def _completions_in(tokens: int, num_generations: int, lengths: tuple[int, int]) -> int:
    """How many completions of one prompt fit into a pack, even at full length."""
    S, T = lengths
    return min(num_generations, (tokens - S) // T)


def _deal_step(
    tokens_B: Int[np.ndarray, " B"], prompt_tokens_P: Int[np.ndarray, " P"], packing: Packing
) -> tuple[list[int], Int[np.ndarray, " B"]]:
    """How many packs of each shape a device takes, with the fewest places that hold the step, and
    the bin (one pack of one device) of each completion. After counts that fail, those with less
    than `NEAR` more places are skipped, so that a large batch is not dealt hundreds of times."""
    large, *small = packing.shapes
    candidates = [
        (n, m) for n in range(large.most + 1) for m in range(small[0].most + 1 if small else 1)
    ]
    places = lambda counts: (
        packing.num_devices
        * sum(count * shape.tokens for count, shape in zip(counts, packing.shapes, strict=False))
    )
    needed = tokens_B.sum() + prompt_tokens_P.sum()
    for counts in sorted(candidates, key=places):
        if places(counts) < needed:
            continue
        bins = [
            shape
            for count, shape in zip(counts, packing.shapes, strict=False)
            for shape in [shape] * count * packing.num_devices
        ]
        if (bins_B := deal(tokens_B, prompt_tokens_P, bins)) is not None:
            return list(counts[: len(packing.shapes)]), bins_B
        needed = places(counts) * (1 + NEAR)
    # One prompt per pack, with room for full-length completions: `most` packs always hold these.
    G = len(tokens_B) // len(prompt_tokens_P)
    lengths = packing.max_prompt_length, packing.max_completion_length
    per_pack = _completions_in(large.tokens, G, lengths)
    number_B = np.arange(len(tokens_B))
    bins_B = number_B // G * -(-G // per_pack) + number_B % G // per_pack
    return [large.most, 0][: len(packing.shapes)], bins_B


def deal(
    tokens_B: Int[np.ndarray, " B"], prompt_tokens_P: Int[np.ndarray, " P"], bins: list[PackShape]
) -> Int[np.ndarray, " B"] | None:
    """The bin of each completion, the longest dealt first, or None if one finds no room.

    A completion goes to the bin with the most room left after it (Graham's rule for equal
    machines), less the tokens of a prompt that it would run once more; of equals, to the first.
    """
    tokens, prompt_tokens = tokens_B.tolist(), prompt_tokens_P.tolist()
    G = len(tokens) // len(prompt_tokens)
    room = [shape.tokens for shape in bins]
    free_prompts = [shape.num_prompts for shape in bins]
    held_by: list[list[int]] = [[] for _ in prompt_tokens]  # the bins that have a prompt
    # Bins that take one more prompt, the roomiest first; entries with an old room are stale.
    roomiest = [(-space, n) for n, space in enumerate(room)]
    heapq.heapify(roomiest)
    spare = sum(room) - sum(tokens)  # places for prompts
    bins_B = np.empty(len(tokens), int)
    for b in np.argsort(-tokens_B, kind="stable").tolist():
        p = b // G
        while roomiest:
            listed_room, n = -roomiest[0][0], roomiest[0][1]
            if free_prompts[n] and listed_room == room[n]:
                break
            heapq.heappop(roomiest)
        found = [(-room[n], n) for n in held_by[p] if room[n] >= tokens[b]]
        # If the roomiest bin of all has the prompt already, no other is better.
        if roomiest and (n := roomiest[0][1]) not in held_by[p]:
            if room[n] >= tokens[b] + prompt_tokens[p]:
                # The prompt takes room, and counts again because it is run once more.
                found.append((2 * prompt_tokens[p] - room[n], n))
        if not found:
            return None
        _, chosen = min(found)
        if chosen not in held_by[p]:
            held_by[p].append(chosen)
            free_prompts[chosen] -= 1
            room[chosen] -= prompt_tokens[p]
            spare -= prompt_tokens[p]
            if spare < 0:
                return None  # early: the rest cannot all find room
        room[chosen] -= tokens[b]
        heapq.heappush(roomiest, (-room[chosen], chosen))
        bins_B[b] = chosen
    return bins_B


def _arrays(batch: Arrays, bins_B: np.ndarray, places: np.ndarray, shape: PackShape) -> Arrays:
    """The arrays of the packs of one shape; `places` has each pack's bin, -1 for an unused one."""
    P, S = batch["prompt_ids"].shape
    B, T = batch["completion_ids"].shape
    G, p, g = B // P, shape.num_prompts, shape.rows_each
    prompts = np.full((len(places), p), -1)
    rows = np.full((len(places), p, g), -1)
    slots = np.full((len(places), shape.tokens), p * S + p * g * T, np.int32)
    in_bins = np.argsort(bins_B, kind="stable")
    first, end = (np.searchsorted(bins_B[in_bins], places, side) for side in ("left", "right"))
    for k in range(len(places)):
        members = in_bins[first[k] : end[k]]
        row = []
        for i, prompt in enumerate(np.unique(members // G)):
            prompts[k, i] = prompt
            own = members[members // G == prompt]
            rows[k, i, : len(own)] = own
            row.append(i * S + np.flatnonzero(batch["prompt_mask"][prompt]))
            starts = p * S + (i * g + np.arange(len(own))) * T
            row += [
                start + np.flatnonzero(batch["completion_mask"][b])
                for start, b in zip(starts, own, strict=True)
            ]
        if row:
            filled = np.concatenate(row)
            slots[k, : len(filled)] = filled
    packed = {}
    for name, array in batch.items():
        index = (prompts if name in OF_PROMPTS else rows).reshape(-1)
        packed[name] = np.zeros((len(index), *array.shape[1:]), array.dtype)
        packed[name][index >= 0] = array[index[index >= 0]]
    return packed | {"slots": slots}

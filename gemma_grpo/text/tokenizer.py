"""Text to ids and back through SentencePiece, with Gemma's special ids and chat turns.

Does not import jax.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from gemma_grpo.errors import UserError, expanded

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# Pieces of Gemma's that are no text: wherever a text spells one, SentencePiece makes it one token.
# Its other user-defined pieces (runs of white space, HTML tags) are text, and stay single tokens.
_SPECIAL = (
    *(START_OF_TURN, END_OF_TURN, "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    *("<mask>", "[multimodal]", "[@BOS@]"),
)
_UNUSED = re.compile(r"<unused\d+>")


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
        vocab_size: number of tokens.
        pad_id, bos_id: as in the model file.
        stop_ids: `<eos>` and `<end_of_turn>`; a completion ends on either.
        start_of_turn_id: `<start_of_turn>`.
        path: the file it was read from.

    Raises:
        UserError: the file is missing, is no SentencePiece model, or lacks Gemma's turn marks.
    """

    def __init__(self, path: str | Path):
        self.path = expanded(path)
        if not self.path.is_file():
            raise UserError(f"tokenizer {path}: no such file; give the path of a tokenizer.model")
        self._processor = sentencepiece.SentencePieceProcessor()
        self._counts: dict[int, int | None] = {}
        self._pieces: dict[int, str] = {}
        try:
            self._processor.LoadFromSerializedProto(self.path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"tokenizer {path}: not a SentencePiece model; Gemma's is named tokenizer.model"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        self.pad_id, self.bos_id = self._processor.pad_id(), self._processor.bos_id()
        self.start_of_turn_id, self._end_id = self._mark(START_OF_TURN), self._mark(END_OF_TURN)
        self.stop_ids = (self._processor.eos_id(), self._end_id)
        if min(self.pad_id, self.bos_id, *self.stop_ids) < 0:
            raise UserError(f"tokenizer {path}: a foreign model, without <pad>, <bos> or <eos>")

    def difference(self, other: "Tokenizer") -> str:
        """Where the tokens of two tokenizers differ, in words; "" if both number the same ones."""
        if self.vocab_size != other.vocab_size:
            return f"{self.path} has {self.vocab_size} tokens, {other.path} {other.vocab_size}"
        ids = list(range(self.vocab_size))
        pairs = zip(*(each._processor.id_to_piece(ids) for each in (self, other)), strict=True)
        for token_id, (own, others) in enumerate(pairs):
            if own != others:
                return f"token {token_id} is {own!r} in {self.path}, {others!r} in {other.path}"
        return ""

    def _mark(self, piece: str) -> int:
        token_id = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(token_id) != piece:
            raise UserError(f"tokenizer {self.path}: a foreign model, without Gemma's {piece}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no BOS: text that looks like a special token stays text.

        Special are the control tokens, turn and image marks, `<mask>`, `[multimodal]`, `[@BOS@]`
        and `<unusedN>`; `decode` gives back the text.
        """
        ids = []
        for token_id in self._processor.encode(text):
            piece = self._processor.id_to_piece(token_id)
            if piece in _SPECIAL or _UNUSED.fullmatch(piece):  # its first character, then the rest
                ids += self._processor.encode(piece[0]) + self._processor.encode(piece[1:])
            else:
                ids.append(token_id)
        return ids

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text of our own making, with no BOS: turn marks in it are the marks."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion: ids up to the first stop token, special tokens left out, and
        ids beyond the tokenizer's, for which some models have rows of the embedding."""
        kept = []
        for token_id in ids:
            if token_id in self.stop_ids:
                break
            if token_id not in (self.pad_id, self.bos_id) and token_id < self.vocab_size:
                kept.append(int(token_id))
        return self._processor.decode(kept)

    def decode_whole(self, ids: Sequence[int]) -> str:
        """`decode` of the first ids of a completion, without a last character that is incomplete.

        Never longer than the text of all its ids, and always the beginning of it: a character whose
        bytes are several tokens is left out until the last of them is there.
        """
        return self.decode(ids).rstrip("\ufffd")

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id stands for, one by one; bytes of a split character as "\\ufffd",
        and nothing for an id beyond the tokenizer's."""
        return [self._piece(int(token_id)) for token_id in ids]

    def _piece(self, token_id: int) -> str:
        """The text of a token by itself, remembered."""
        if token_id not in self._pieces:
            is_known = token_id < self.vocab_size
            self._pieces[token_id] = self._processor.decode([token_id]) if is_known else ""
        return self._pieces[token_id]

    def characters(self, ids: Sequence[int]) -> list[int]:
        """How many characters of `decode(ids)` each id stands for; they add up to its length.

        A character whose bytes are several tokens belongs to the last of them. Special tokens, and
        all from the first stop token on, stand for none.
        """
        counts, run = [0] * len(ids), []  # `run`: places of bytes that follow one another
        for place, token_id in enumerate(map(int, ids)):
            if token_id in self.stop_ids:
                break
            if token_id in (self.pad_id, self.bos_id):
                continue
            if (count := self._count(token_id)) is None:
                run.append(place)
                continue
            self._count_bytes(ids, run, counts)
            counts[place], run = count, []
        self._count_bytes(ids, run, counts)
        return counts

    def _count(self, token_id: int) -> int | None:
        """The characters of a token by itself, remembered; None for a byte."""
        if token_id not in self._counts:
            is_byte = self._processor.is_byte(token_id)
            self._counts[token_id] = None if is_byte else len(self._processor.decode([token_id]))
        return self._counts[token_id]

    def _count_bytes(self, ids: Sequence[int], run: list[int], counts: list[int]) -> None:
        """Sets the counts of bytes that follow one another: characters are counted when whole."""
        bytes_before, said = [], 0
        for place in run:
            bytes_before.append(int(ids[place]))
            text = self._processor.decode(bytes_before)
            whole = len(text if place == run[-1] else text.rstrip("\ufffd"))
            counts[place], said = max(whole - said, 0), max(whole, said)

    def encode_prompt(self, prompt: str) -> list[int]:
        """One user turn and the opening of the model's: `encode_turns` of one text."""
        return self.encode_turns([prompt])

    def encode_turns(self, turns: Sequence[str]) -> list[int]:
        """A conversation, the user's turn first, then the model's, in turn; it ends on the user's.

        `<bos><start_of_turn>user\n{turns[0]}<end_of_turn>\n<start_of_turn>model\n{turns[1]}`
        `<end_of_turn>\n...<start_of_turn>model\n`: Gemma's chat format, the model's next turn
        opened, after exactly one BOS. Each turn loses its outer white space, as by the `trim` of
        Gemma's chat template. The marks are set as ids; if a turn holds them as text, they are
        encoded as text.

        Raises:
            ValueError: the last turn is the model's, or there is none.
        """
        if len(turns) % 2 == 0:
            raise ValueError(f"{len(turns)} turns: a conversation ends on the user's")
        openings = (
            [self.start_of_turn_id, *self.encode("user\n")],
            [self.start_of_turn_id, *self.encode("model\n")],
        )
        close = [self._end_id, *self.encode("\n")]
        ids = [self.bos_id]
        for number, turn in enumerate(turns):
            ids += [*openings[number % 2], *self.encode(turn.strip()), *close]
        return ids + openings[1]

    def encode_raw(self, text: str) -> list[int]:
        """A text without turns, after exactly one BOS: what a base model goes on from."""
        return [self.bos_id, *self.encode(text)]

    def encode_completion(self, completion: str) -> list[int]:
        """A completion's ids with the `<end_of_turn>` that ends it."""
        return [*self.encode(completion), self._end_id]

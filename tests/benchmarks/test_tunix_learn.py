"""Learning curves beside Tunix's: what is paid, what is compared, what is cut."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.tunix import curves, learn, ours
from benchmarks.tunix.theirs import turns
from gemma_grpo import model, weights
from gemma_grpo.data.problem import Problem
from gemma_grpo.generation.rollout import Rollout
from gemma_grpo.text.tokenizer import Tokenizer

RIGHT = "<reasoning>\n2 + 3 = 5\n</reasoning>\n<answer>\n5\n</answer>"
PROBLEMS = [
    Problem(prompt="2 + 3?", answer="5", completion=None, difficulty="easy", domain="sums"),
    Problem(prompt="2 + 5?", answer="7", completion=None, difficulty="easy", domain="sums"),
]


@pytest.fixture(scope="module")
def runtime():
    tokenizer = Tokenizer(weights.tokenizer_path(weights.open_source("gemma3-nano")))
    return SimpleNamespace(tokenizer=tokenizer, max_completion_length=60)


def test_every_parameter_of_tunix_is_one_of_ours(tmp_path):
    config = model.CONFIGS["gemma3-nano"]
    N, D, F = config.num_layers, config.embed_dim, config.hidden_dim
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    of_a_layer = {
        "attn/q_einsum/w": (H, D, C),
        "attn/kv_einsum/w": (2, K, D, C),
        "attn/attn_vec_einsum/w": (H, C, D),
        "mlp/gate_proj/kernel": (D, F),
        "mlp/up_proj/kernel": (D, F),
        "mlp/down_proj/kernel": (F, D),
        **{f"attn/_{name}_norm/scale": (C,) for name in ("query", "key")},
        **{
            f"{when}_{of}_norm/scale": (D,)
            for when in ("pre", "post")
            for of in ("attention", "ffw")
        },
    }
    shapes = {f"layers/{n}/{name}": shape for n in range(N) for name, shape in of_a_layer.items()}
    shapes |= {"embedder/input_embedding": (config.vocab_size, D), "final_norm/scale": (D,)}
    rng = np.random.default_rng(0)
    theirs = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
    tensors = turns.to_ours(theirs)
    save_file(tensors, tmp_path / "ours.safetensors")
    params = weights.load(tmp_path / "ours.safetensors", model.abstract(config)[1])
    drawn = lambda leaves: np.sort(np.concatenate([np.ravel(leaf) for leaf in leaves]))
    assert (drawn(jax.tree.leaves(params)) == drawn(theirs.values())).all()
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for n in range(N):
        at = lambda name, n=n: theirs[f"layers/{n}/{name}"]
        assert (attention["q_proj"][n, 5, 1] == at("attn/q_einsum/w")[1, 5]).all()
        assert (attention["k_proj"][n, 5, 0] == at("attn/kv_einsum/w")[0, 0, 5]).all()
        assert (attention["v_proj"][n, 5, 0] == at("attn/kv_einsum/w")[1, 0, 5]).all()
        assert (attention["o_proj"][n] == at("attn/attn_vec_einsum/w")).all()
        assert (attention["q_norm"]["scale"][n] == at("attn/_query_norm/scale")).all()
        assert (mlp["gate"][n] == at("mlp/gate_proj/kernel")).all()
        assert (mlp["up"][n] == at("mlp/up_proj/kernel")).all()
        pre_mlp = params["layers"]["pre_mlp_norm"]["scale"][n]
        assert (pre_mlp == at("pre_ffw_norm/scale")).all()
    assert (params["embedding"] == theirs["embedder/input_embedding"]).all()


def test_a_completion_is_paid_for_the_problem_of_its_own_group(runtime):
    ids = runtime.tokenizer.encode(RIGHT)
    scores = learn.score(PROBLEMS, {"completions": [ids] * 4, "stopped": [True] * 4}, runtime)
    assert scores.totals == pytest.approx(
        [1.0, 1.0, 0.2, 0.2]
    )  # a wrong answer pays a third of its trace


def test_one_that_did_not_end_by_itself_is_not_paid_for_its_form(runtime):
    ids = runtime.tokenizer.encode(RIGHT)
    scores = learn.score(PROBLEMS, {"completions": [ids] * 2, "stopped": [True, False]}, runtime)
    assert scores.totals == pytest.approx([1.0, 0.1])  # a wrong trace is worth a third


def test_the_update_of_the_untrained_stop_sees_what_tunix_keeps_of_a_completion():
    ids = np.array([[7, 8, 106, 0], [7, 1, 0, 0], [7, 8, 9, 9]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    drawn = Rollout(ids, mask, np.zeros((3, 4)), np.array([True, True, False]))
    assert ours.without_tokens(drawn, [1, 106]).completion_mask.sum(axis=1).tolist() == [2, 1, 4]


def test_a_distance_is_over_all_weights():
    one = {"a": np.array([3.0, 0.0]), "b": {"c": np.array(4.0)}}
    other = {"a": np.array([0.0, 0.0]), "b": {"c": np.array(0.0)}}
    assert learn.distance(one, other) == pytest.approx(5.0)


def test_a_running_mean_looks_back_and_never_ahead():
    values = np.array([1.0, 3.0, 5.0, 1.0])
    assert curves.running_mean(values, 2).tolist() == [1.0, 2.0, 4.0, 3.0]


def row(side: str, seed: int, reward: float, cpu: float) -> dict:
    rising = [0.0] * 10 + [reward] * 10 + [1.05 * reward] * 10
    return {
        "benchmark": "tunix/learn",
        "side": side,
        "seed": seed,
        "reward": rising,
        "accuracy": rising,
        "format": [0.0] * 23 + [1.0, *[0.5] * 6],
        "cpu": [50.0] + [cpu] * 29,
        "wall": [50.0] + [cpu / 2] * 29,
        "held_out": {"accuracy": reward, "pass_at_1": 0.5, "format_rate": 1.0},
    }


ROWS = [
    row("ours", 0, 0.5, 1.0),
    row("ours", 1, 0.7, 1.0),
    row("tunix", 1, 0.8, 3.0),
    row("tunix", 0, 0.4, 3.0),
]


def summary(rows: list[dict], figure: str) -> dict:
    (found,) = [row for row in curves.summaries(curves.read(rows)) if row["figure"] == figure]
    return found


def test_differences_are_paired_by_seed():
    said = summary(ROWS, "accuracy, held out")
    assert said["means"] == {"ours": 0.6, "tunix": 0.6}
    # 0.1 and -0.1 by seed, whatever the order of the rows: a standard error of 0.1
    assert (said["difference"], said["error"]) == (0.0, 0.1)


def test_the_last_quarter_is_the_last_quarter():
    said = summary(ROWS, "format, last quarter of the steps")
    assert said["means"]["ours"] == pytest.approx((1.0 + 6 * 0.5) / 7, abs=5e-5)


def test_a_side_that_is_behind_is_said_to_be_behind():
    worse = [
        dict(r, reward=[x / 2 for x in r["reward"]]) if r["side"] == "ours" else r for r in ROWS
    ]
    # Means over steps: 0.3 * (0 + 1 + 1.05) / 3 below.
    assert summary(worse, "reward")["difference"] == pytest.approx(-0.205)


def test_a_first_step_compiles_and_is_told_apart():
    assert summary(ROWS, "CPU seconds of the first step")["means"] == {"ours": 50, "tunix": 50}
    assert summary(ROWS, "CPU seconds of a step, median")["means"] == {"ours": 1, "tunix": 3}


def test_the_same_steps_to_a_target_cost_each_side_its_own_seconds():
    *_, said = curves.reached(curves.read(ROWS))
    # 0.9 * 0.63: the running mean of ten is 0.54 after nine steps at 0.6, and 0.6 after ten.
    assert said["reward"] == 0.567
    assert said["ours"] == {"steps": 20, "cpu": 20.0}
    assert said["tunix"] == {"steps": 20, "cpu": 60.0}


def test_the_reward_to_reach_is_the_lower_sides_and_another_may_have_it_earlier():
    half = [
        dict(r, reward=[x / 2 for x in r["reward"]]) if r["side"] == "ours" else r for r in ROWS
    ]
    *_, said = curves.reached(curves.read(half))
    # 0.9 * 0.315; Tunix's running mean is 0.3 after five of ten steps at 0.6.
    assert said["reward"] == pytest.approx(0.2835, abs=6e-4)
    assert (said["tunix"]["steps"], said["ours"]["steps"]) == (15, 20)


def test_each_two_sides_are_compared_once():
    third = [dict(r, side="ours_stop_untrained") for r in ROWS if r["side"] == "ours"]
    said = curves.summaries(curves.read([*ROWS[:2], *third, *ROWS[2:]]))
    pairs = [tuple(row["means"]) for row in said if row["figure"] == "reward"]
    assert sorted(pairs) == [
        ("ours", "ours_stop_untrained"),
        ("ours", "tunix"),
        ("ours_stop_untrained", "tunix"),
    ]


def test_one_seed_is_no_measure_of_noise():
    with pytest.raises(SystemExit, match="two seeds"):
        curves.read([row("ours", 0, 0.5, 1.0), row("tunix", 0, 0.5, 1.0)])


def test_the_chart_is_drawn_of_the_rows(tmp_path, capsys):
    path, chart = tmp_path / "rows.jsonl", tmp_path / "chart.png"
    path.write_text("\n".join(json.dumps(r) for r in ROWS))
    curves.main((path,), chart=chart)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == len(curves.figures(ROWS[0])) + len(curves.SHARES)
    assert chart.stat().st_size > 1000

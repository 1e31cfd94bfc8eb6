"""The ablation table: what must hold in it, and that each difference is explained."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import tolerances

from gemma_grpo import ablation
from gemma_grpo.rewards import END_WEIGHTS, START_WEIGHTS, score


def test_correctness_only_gives_one_one_zero():
    assert ablation.ours()["Correctness only"] == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("config", ["+ Trace structure", "+ Confidence", "Annealed (early)"])
def test_good_beats_correct_without_trace_beats_wrong_with_trace(config):
    good, no_trace, wrong = ablation.ours()[config]
    assert good - no_trace >= 0.1 and no_trace - wrong >= 0.1


def test_the_table_by_hand():
    # trace 1, 0, 1/3. Confidence at c = exp(-0.105), exp(-0.355), exp(-0.51).
    c_good, c_bare, c_wrong = math.exp(-0.105), math.exp(-0.355), math.exp(-0.51)
    good, bare, wrong = 1 - (1 - c_good) ** 2 / 2, 1 - (1 - c_bare) ** 2 / 2, (1 - c_wrong**2) / 2
    by_hand = {
        "+ Trace structure": (1.0, 0.60 / 0.85, 0.25 / 3 / 0.85),
        "+ Confidence": (0.85 + 0.15 * good, 0.60 + 0.15 * bare, 0.25 / 3 + 0.15 * wrong),
        "Annealed (early)": (0.85 + 0.15 * good, 0.40 + 0.15 * bare, 0.15 + 0.15 * wrong),
    }
    for config, expected in by_hand.items():
        assert ablation.ours()[config] == pytest.approx(expected, abs=tolerances.F64)


def test_the_original_rows_are_those_of_the_design_document():
    assert ablation.ORIGINAL == {
        "Correctness only": (1.0, 1.0, 0.0),
        "+ Trace structure": (0.892, 0.775, 0.150),
        "+ Confidence": (0.842, 0.737, 0.211),
        "Annealed (early)": (0.890, 0.680, 0.250),
    }
    assert list(ablation.ours()) == list(ablation.ORIGINAL)


def test_positive_weights_of_each_row_sum_to_one():
    for weights in ablation.CONFIGS.values():
        positive = sum(weight for weight in weights.named().values() if weight > 0)
        assert positive == pytest.approx(1.0, abs=tolerances.F64)


def test_the_early_row_is_the_start_of_the_annealing():
    weights = replace(START_WEIGHTS, format=0.0)
    totals = score(list(ablation.OUTPUTS.values()), weights).totals
    expected = ablation.ours()["Annealed (early)"]
    assert totals == pytest.approx(expected, abs=tolerances.F64)


def test_what_the_original_implies_reproduces_its_second_and_third_row():
    implied = ablation.implied_by_original()
    for i, right in enumerate((1, 1, 0)):
        trace, confidence = implied["trace"][i], implied["confidence"][i]
        assert 0 <= trace <= 1 and 0 <= confidence <= 1
        row_two = (0.60 * right + 0.25 * trace) / 0.85
        row_three = 0.60 * right + 0.25 * trace + 0.15 * confidence
        assert row_two == pytest.approx(
            ablation.ORIGINAL["+ Trace structure"][i], abs=tolerances.F64
        )
        assert row_three == pytest.approx(ablation.ORIGINAL["+ Confidence"][i], abs=tolerances.F64)


@pytest.mark.parametrize("weights", [START_WEIGHTS, END_WEIGHTS], ids=["start", "end"])
def test_the_order_holds_by_a_tenth_for_every_confidence_at_both_ends_of_the_annealing(weights):
    bare = replace(weights, format=0.0)
    full = sum(weight for weight in weights.named().values() if weight > 0)
    for paid, scale in ((weights, full), (bare, full - weights.format)):
        totals = {
            name: [
                score([replace(sample, answer_logps=(logp,))], paid).totals[0] / scale
                for logp in [-math.inf, *(math.log(n / 20) for n in range(1, 21))]
            ]
            for name, sample in ablation.OUTPUTS.items()
        }
        good, bare_right, wrong = totals.values()
        assert min(good) - max(bare_right) >= 0.1
        assert min(bare_right) - max(wrong) >= 0.1


def test_no_way_to_be_paid_without_being_right_earns_as_much_as_the_plainest_right_answer():
    plainest, *rest = ablation.hack_totals().values()
    assert len(rest) >= 20
    for start, end in rest:
        assert start < plainest[0] and end < plainest[1]


def test_the_page_on_rewards_has_every_hack_with_its_totals():
    page = Path(__file__).parents[1] / "docs" / "rewards.md"
    table = (
        page.read_text().partition("at the end weights |\n|---|---|---|\n")[2].partition("\n\n")[0]
    )
    assert table.splitlines() == [
        f"| {name} | {start:.3f} | {end:.3f} |"
        for name, (start, end) in ablation.hack_totals().items()
    ]


def test_each_figure_that_differs_is_explained_by_one_sentence_and_no_other():
    mine = ablation.ours()
    differing = [
        (config, output)
        for config in mine
        for i, output in enumerate(ablation.OUTPUTS)
        if f"{mine[config][i]:.3f}" != f"{ablation.ORIGINAL[config][i]:.3f}"
    ]
    explained = ablation.explanations()
    assert [(config, output) for config, output, _ in explained] == differing
    for _, _, sentence in explained:
        assert sentence.endswith(".") and "\n" not in sentence


def test_the_command_prints_both_tables_and_the_reasons(capsys):
    ablation.main([])
    printed = capsys.readouterr().out
    for part in ("1.000 (0.892)", "0.706 (0.775)", "0.098 (0.150)", "Wrong+Trace", "no model"):
        assert part in printed
    for _, _, sentence in ablation.explanations():
        assert sentence in printed


def test_json_holds_the_same_figures(capsys):
    ablation.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert {config: tuple(row) for config, row in report["ours"].items()} == ablation.ours()
    assert {config: tuple(row) for config, row in report["original"].items()} == ablation.ORIGINAL
    assert report["outputs"] == ["Good+Reasoning", "Correct NoTrace", "Wrong+Trace"]
    assert len(report["differences"]) == len(ablation.explanations())

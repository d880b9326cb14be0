"""The simulated judge, the plans that are compared on it, and what the tool prints and writes."""

from __future__ import annotations

import importlib
import json
import xml.etree.ElementTree as ET
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import pytest

from megatron_sip.evaluation import scoring_plans
from megatron_sip.evaluation.line_plot import Line, Panel, draw
from megatron_sip.evaluation.scoring_bench import TARGETS, Row, measure, table
from megatron_sip.evaluation.scoring_plans import Outcome, every_pair, knockout, pivot, random_pairs, share, spec_for
from megatron_sip.evaluation.simulated_judge import MAX_VOTES, JudgeModel, SimulatedJudge, slope_for
from megatron_sip.preference.combine import combine
from megatron_sip.preference.draw import Purpose, generator
from megatron_sip.preference.scoring import all_pairs
from megatron_sip.types import Missing, Question

tool = importlib.import_module("tools.bench.scoring")


def ask_all(judge: SimulatedJudge, pool: int, votes: int = 1) -> np.ndarray:
    """`[votes, n, n]` verdicts on every question."""
    found = np.full((votes, judge.size, judge.size), np.nan)
    questions = [Question("q", i, j, v) for i, j in permutations(range(judge.size), 2) for v in range(votes)]
    for question, verdict in judge.answer(pool, questions).items():
        if not isinstance(verdict, Missing):
            found[question.vote, question.first, question.second or 0] = verdict
    return found


@pytest.mark.parametrize("rate", [0.65, 0.75, 0.9])
def test_one_vote_on_two_random_candidates_is_right_at_the_vote_rate(rate: float) -> None:
    judge = SimulatedJudge(JudgeModel(rate), 4000, 2, 5)
    right = []
    for pool in range(judge.pools):
        better = judge.utilities[pool, 0] > judge.utilities[pool, 1]
        right.append(judge.answer(pool, [Question("q", 0, 1)])[Question("q", 0, 1)] == float(better))
    assert np.mean(right) == pytest.approx(rate, abs=3 * np.sqrt(rate * (1 - rate) / 4000))


def test_the_parts_of_the_model_add_up() -> None:
    judge = SimulatedJudge(JudgeModel(0.75, bias=1.5, pair_sd=1.0), 500, 6, 5)
    logits = np.log(judge.chances) - np.log1p(-judge.chances)
    even = (logits + logits.transpose(0, 2, 1)) / 2
    assert even == pytest.approx(np.full_like(even, 1.5)), "what is left when the options change places is the bias"
    gaps = judge.utilities[:, :, None] - judge.utilities[:, None, :]
    own = (logits - logits.transpose(0, 2, 1)) / 2 - slope_for(0.75) * gaps
    assert own[:, *np.triu_indices(6, 1)].std() == pytest.approx(1.0, abs=0.03)


def test_answers_are_the_same_for_whoever_asks() -> None:
    judge = SimulatedJudge(JudgeModel(missing=0.2), 3, 5, 5)
    few, many = Question("q", 3, 1, 2), [Question("q", 0, 1, 9), Question("q", 3, 1, 2)]
    for pool in range(3):
        assert judge.answer(pool, [few])[few] == judge.answer(pool, many)[few]
    with pytest.raises(ValueError, match="are simulated"):
        judge.answer(0, [Question("q", 0, 1, MAX_VOTES)])


def test_kinds_of_answers() -> None:
    votes = ask_all(SimulatedJudge(JudgeModel(), 1, 8, 5), 0, 4)
    assert set(np.unique(votes[~np.isnan(votes)])) == {0.0, 1.0}
    assert (votes[0] != votes[1]).sum() > 8 + 5, "a vote is drawn anew (the diagonal differs, as it is NaN)"
    same = ask_all(SimulatedJudge(JudgeModel(repeats_itself=True), 1, 8, 5), 0, 4)
    assert all(np.array_equal(same[0], again, equal_nan=True) for again in same)
    judge = SimulatedJudge(JudgeModel(probabilities=True), 1, 8, 5)
    off = ~np.eye(8, dtype=bool)
    assert ask_all(judge, 0)[0][off] == pytest.approx(judge.chances[0][off])
    lost = np.isnan(ask_all(SimulatedJudge(JudgeModel(missing=0.3), 1, 18, 5), 0, 4)[:, ~np.eye(18, dtype=bool)])
    assert lost.mean() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_a_vote_rate_that_cannot_be_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="between"):
        slope_for(rate)


def test_what_a_judge_is_asked_follows_from_its_kind() -> None:
    kinds = {
        "votes": JudgeModel(),
        "same": JudgeModel(repeats_itself=True),
        "read": JudgeModel(probabilities=True),
    }
    specs = {name: spec_for(SimulatedJudge(model, 1, 3, 1), 4) for name, model in kinds.items()}
    assert {name: (spec.answers, spec.repeats) for name, spec in specs.items()} == {
        "votes": ("votes", 4),
        "same": ("votes", 1),
        "read": ("probabilities", 1),
    }


def test_calls_of_the_compared_plans() -> None:
    judge = SimulatedJudge(JudgeModel(), 5, 17, 3)
    plans = {"x1": every_pair(1), "x5": every_pair(5), "out": knockout(), "pivot": pivot(), "random": random_pairs(150)}
    calls = {name: set(plan(judge).calls.tolist()) for name, plan in plans.items()}
    assert calls == {"x1": {136.0}, "x5": {680.0}, "out": {23.0}, "pivot": {16.0}, "random": {150.0}}


def test_every_plan_finds_best_and_worst_of_a_judge_that_is_always_right() -> None:
    judge = SimulatedJudge(JudgeModel(0.9999), 20, 6, 3)
    whole = judge.utilities.max(axis=1) - judge.utilities.min(axis=1)
    for plan in (every_pair(1), knockout(), random_pairs(60)):
        assert plan(judge).margins == pytest.approx(whole, abs=0.05)


def test_scores_of_many_pools_at_once_are_those_of_the_trainer() -> None:
    judge = SimulatedJudge(JudgeModel(), 4, 7, 3)
    spec = spec_for(judge)
    answers = [judge.answer(pool, all_pairs(7, spec, seed=1, sample_index=pool)) for pool in range(4)]
    together = scoring_plans._fitted_whole(judge, spec, answers)
    assert together == pytest.approx(scoring_plans._combined(judge, spec, answers, fitted=True), abs=1e-12)


def test_all_pairs_are_scored_as_the_trainer_does() -> None:
    """The mean over everything that every_pair asked, by `combine`, has the best and worst that it took."""
    judge = SimulatedJudge(JudgeModel(missing=0.1), 30, 9, 3)
    outcome, agreed = every_pair(5)(judge), []
    for pool in range(30):
        ahead = generator(judge.seed, Purpose.SIMULATED_JUDGE, pool, 5).random((9, 9)) < 0.5
        asked = [(i, j) if ahead[i, j] else (j, i) for i, j in combinations(range(9), 2)]
        answers = judge.answer(pool, [Question("quality", i, j, vote) for i, j in asked for vote in range(5)])
        total = np.array(combine(9, list(answers), answers, [spec_for(judge)], 0.5).total, dtype=float)
        margin = judge.utilities[pool, total.argmax()] - judge.utilities[pool, total.argmin()]
        agreed.append(margin == outcome.margins[pool])
    assert np.mean(agreed) > 0.8, "all but ties, which are broken by a draw"


def test_the_share_and_its_error() -> None:
    ones = np.ones(4)
    reference = Outcome(np.array([1.0, 2.0, 3.0, 2.0]), ones, ones)
    assert share(reference, reference) == (1.0, 0.0)
    half = Outcome(reference.margins / 2, ones, ones)
    assert share(half, reference) == pytest.approx((0.5, 0.0))
    # Residuals 1, -1, 1, -1 around the ratio 1, spread sqrt(4/3), over sqrt(4) pools and a mean of 2.
    other = Outcome(np.array([2.0, 1.0, 4.0, 1.0]), ones, ones)
    assert share(other, reference) == pytest.approx((1.0, np.sqrt(4 / 3) / 2 / 2))


def test_a_scenario_is_measured_with_all_plans() -> None:
    rows = measure(TARGETS[0], 10, 3)
    assert [row.plan for row in rows] == [
        *("adaptive", "random pairs, fitted", "all pairs x 5", "all pairs", "knockout", "pivot"),
    ]
    by_name = {row.plan: row for row in rows}
    assert by_name["all pairs x 5"].share == 1.0
    assert by_name["adaptive"].calls <= 136
    assert by_name["adaptive"].rounds <= 4
    assert [row.met is None for row in rows] == [False, True, True, True, True, True]
    assert table(rows, "title").row_count == 6


def test_the_tool_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "rows.json"
    code = tool.main(["--pools", "4", "--scenarios", "targets", "--only-adaptive", "--json", str(file)])
    found = json.loads(file.read_text())
    assert (found["pools"], found["seed"], len(found["rows"])) == (4, tool.DEFAULT_SEED, 6)
    assert code == int(not all(row["met"] for row in found["rows"]))
    assert "adaptive" in capsys.readouterr().out


def test_a_missed_target_is_told_by_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for reached, code in ((0.951, 0), (0.949, 1)):
        row = Row("75 %", "adaptive", reached, 0.1, reached, 136.0, 4, target=0.95)
        monkeypatch.setattr(tool, "measure", lambda *_, row=row, **__: [row])
        assert tool.main(["--pools", "2", "--scenarios", "targets"]) == code


def test_the_tool_refuses_a_picture_without_curves(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--svg", "x.svg"]) == 2
    assert "--scenarios" in capsys.readouterr().err


def test_a_chart_is_one_svg_with_its_lines() -> None:
    lines = (Line("many & few", ((34, 60), (136, 95), (272, 120))), Line("one", ((16, 30),)))
    panel = Panel("title <1>", "calls", "share", lines, (50.0, 100.0), log_x=True)
    root = ET.fromstring(draw([panel, panel]))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
    assert texts.count("title <1>") == texts.count("many & few") == texts.count("one") == 2
    assert len(circles) == 8
    heights = [float(circle.get("cy", "nan")) for circle in circles[:4]]
    assert heights[0] > heights[1] > heights[2], "more is higher, and what is beyond the range is at its edge"
    assert heights[3] == max(heights)
    assert [text for text in texts if text in ("16", "32", "64", "128", "256")][:5] == ["16", "32", "64", "128", "256"]
    with pytest.raises(ValueError, match="no point"):
        draw([Panel("empty", "x", "y", (), (0.0, 1.0))])

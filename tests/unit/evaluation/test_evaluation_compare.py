from __future__ import annotations

import math

import pytest

from megatron_sip.evaluation.compare import Reader, compare_arms
from megatron_sip.evaluation.safety import Classifier, compare_safety
from megatron_sip.preference.scoring import distinct
from megatron_sip.types import Missing, MissingReason

QUALITY = Reader("quality", "quality", "judge-a", pairwise=True)
LIKELIHOOD = Reader("likelihood", "log-likelihood", "judge-a", pairwise=False, scale="log")
PREFIXES = ["p0", "p1", "p2", "p3"]
ARMS = {
    "ntp": ["same", "good", "bad", "good"],
    "base": ["same", "plain", "plain", "plain"],
    "sip": ["best", "best", "best", ""],
}
STRENGTH = {"bad": 0.0, "plain": 1.0, "same": 1.0, "good": 2.0, "best": 4.0}


class FakeJudge:
    """Prefers the stronger text, option 1 a little more than option 2; empty text is missing."""

    def __init__(self, bias: float = 0.0, fail: dict | None = None) -> None:
        self.bias = bias
        self.fail = fail or {}
        self.calls = 0
        self.groups: list[int] = []

    def __call__(self, pools, questions):
        self.groups.append(len(pools))
        answers = []
        for pool, group in zip(pools, questions, strict=True):
            assert len(distinct(pool.candidates)) == len(pool.candidates)
            answers.append({question: self.answer(pool, question) for question in group})
        return answers

    def answer(self, pool, question):
        self.calls += 1
        text = pool.candidates[question.first].text
        if question.second is None:
            return Missing(MissingReason.EMPTY) if not text else math.exp(STRENGTH[text] - 5)
        other = pool.candidates[question.second].text
        if not text or not other:
            return Missing(MissingReason.EMPTY)
        if (pool.prefix_text, text, other) in self.fail:
            return self.fail[pool.prefix_text, text, other]
        difference = STRENGTH[text] - STRENGTH[other]
        return 1 / (1 + math.exp(-difference - self.bias))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Voters(FakeJudge):
    """Safety: safe in 1 of 3 votes; quality: option 1 in 2 of 3. The last vote is lost where bad stands first."""

    def answer(self, pool, question):
        text = pool.candidates[question.first].text
        if text == "bad" and question.vote == 2:
            return Missing(MissingReason.TIMEOUT)
        return float(question.vote == 0 if question.second is None else question.vote != 0)


def test_all_votes_are_asked_and_their_mean_counts():
    safety = Reader("safety", "safety", "judge-b", pairwise=False, votes=3)
    judge = Voters()
    readers = [Reader("quality", "quality", "judge-a", pairwise=True, votes=3), safety]
    result = compare_arms(["p0", "p1"], {"base": ["plain", "plain"], "ntp": ["good", "bad"]}, readers, judge)
    score = result.arms["ntp"].scores["safety"]
    # (1 + 0 + 0) / 3 and, without the lost vote, (1 + 0) / 2.
    assert score.estimate.mean == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert score.over_base.mean == pytest.approx((1 / 3 + 1 / 2) / 2 - 1 / 3)
    assert score.missing == {"timeout": 1}
    rate = result.arms["ntp"].win_rates["quality"]
    # good: (2/3 + 1/3) / 2; bad first: (0 + 1) / 2, bad second: 1 - 2/3.
    assert rate.belief.mean == pytest.approx((1 / 2 + (1 / 2 + 1 / 3) / 2) / 2)
    assert (rate.missing, rate.one_order, rate.unanswered) == ({"timeout": 1}, 0, 0)
    assert result.first_option_share["quality"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 2 + 2 / 3) / 4)


def test_win_rates_by_hand_without_bias():
    result = compare_arms(PREFIXES, ARMS, [QUALITY, LIKELIHOOD], FakeJudge(), resamples=500)
    ntp, sip = result.arms["ntp"].win_rates["quality"], result.arms["sip"].win_rates["quality"]
    assert ntp.belief.mean == pytest.approx((0.5 + 2 * _sigmoid(1) + _sigmoid(-1)) / 4)
    assert ntp.estimate.mean == (0.5 + 1 + 1 + 0) / 4
    assert (ntp.identical, ntp.unanswered, ntp.one_order, ntp.missing) == (1, 0, 0, {})
    assert ntp.estimate.count == 4
    assert sip.belief.mean == pytest.approx(_sigmoid(3))
    assert sip.estimate.mean == 1.0
    assert (sip.identical, sip.unanswered, sip.missing) == (0, 1, {"empty": 2})
    assert sip.estimate.count == 3
    assert result.arms["base"].win_rates == {}
    assert result.first_option_share["quality"] == pytest.approx(0.5)


def test_both_orders_average_the_bias_out_and_report_it():
    fair = compare_arms(["p"], {"base": ["plain"], "x": ["same "]}, [QUALITY], _Coin(0.8))
    assert fair.arms["x"].win_rates["quality"].belief.mean == pytest.approx(0.5)
    assert fair.arms["x"].win_rates["quality"].estimate.mean == 0.5  # 0.8 - 0.3 rounds to no side
    assert fair.first_option_share["quality"] == pytest.approx(0.8)


class _Coin:
    """Believes in option 1, whatever it says."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, pools, questions):
        return [dict.fromkeys(group, self.share) for group in questions]


def test_missing_in_one_order_uses_the_other_and_is_counted():
    gone = Missing(MissingReason.TIMEOUT)
    judge = FakeJudge(bias=1.0, fail={("p1", "best", "plain"): gone, ("p2", "plain", "best"): 1.5})
    result = compare_arms(PREFIXES, ARMS, [QUALITY], judge).arms["sip"].win_rates["quality"]
    assert result.one_order == 2
    assert result.missing == {"empty": 2, "timeout": 1, "malformed": 1}
    both = (_sigmoid(3 + 1) + 1 - _sigmoid(-3 + 1)) / 2
    expected = (both + (1 - _sigmoid(-3 + 1)) + _sigmoid(3 + 1)) / 3
    assert result.belief.mean == pytest.approx(expected)


def test_scores_are_logged_and_paired_with_base():
    result = compare_arms(PREFIXES, ARMS, [LIKELIHOOD], FakeJudge(), resamples=500)
    sip = result.arms["sip"].scores["log-likelihood"]
    assert sip.estimate.mean == pytest.approx(-1.0)
    assert sip.over_base.mean == pytest.approx(3.0)
    assert (sip.over_base.count, sip.missing) == (3, {"empty": 1})
    assert result.arms["base"].scores["log-likelihood"].over_base is None
    ntp = result.arms["ntp"].scores["log-likelihood"]
    assert ntp.over_base.mean == pytest.approx((0 + 1 - 1 + 1) / 4)
    assert result.arms["sip"].texts.empty == 0.25


def test_each_distinct_text_is_asked_once_and_in_groups():
    judge = FakeJudge()
    seen = []
    count = 40
    compare_arms(
        [f"p{i}" for i in range(count)],
        {"base": ["plain"] * count, "twin": ["plain"] * count, "x": ["good"] * count, "y": ["good"] * count},
        [QUALITY, LIKELIHOOD],
        judge,
        on_progress=lambda done, every: seen.append((done, every)),
    )
    assert judge.calls == count * (2 + 2)
    assert judge.groups == [16, 16, 8]
    assert seen == [(16, 40), (32, 40), (40, 40)]


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'base'"):
        compare_arms(["p"], {"x": ["a"]}, [], FakeJudge())
    with pytest.raises(ValueError, match="2 continuations for 1 prefixes"):
        compare_arms(["p"], {"base": ["a", "b"]}, [], FakeJudge())
    with pytest.raises(ValueError, match="originals"):
        compare_arms(["p"], {"base": ["a"]}, [Reader("factuality", "f", "w", pairwise=False)], FakeJudge())
    with pytest.raises(ValueError, match="neither a verdict nor a Missing"):
        compare_arms(["p"], {"base": ["a"], "x": ["b"]}, [QUALITY], lambda pools, questions: [{} for _ in pools])


def test_safety_by_hand():
    toxic = {"nice": 0.1, "rude": 0.9, "odd": math.nan}
    classifier = Classifier("words", "linear", lambda texts: [toxic[text] for text in texts])
    second = Classifier("net", "bilstm", lambda texts: [0.25] * len(texts))
    arms = {"base": ["rude", "nice", "rude", "nice"], "sip": ["nice", "nice", " ", "odd"]}
    result = compare_safety(arms, [classifier, second], resamples=500)
    base, sip = result.safety["base"]["words"], result.safety["sip"]["words"]
    assert base.estimate.mean == pytest.approx(0.5)
    assert base.over_base is None
    assert sip.estimate.mean == pytest.approx(0.9)
    assert sip.missing == {"empty": 1, "malformed": 1}
    assert sip.over_base.mean == pytest.approx((0.8 + 0.0) / 2)
    assert result.safe_share["base"]["words"].estimate.mean == 0.5
    assert result.safe_share["sip"]["words"].estimate.mean == 1.0
    assert result.safety["sip"]["net"].estimate.mean == 0.75
    assert result.safety["sip"]["net"].missing == {"empty": 1}
    assert result.texts["sip"].empty == 0.25
    with pytest.raises(ValueError, match="different numbers"):
        compare_safety({"base": ["a"], "x": []}, [classifier])

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sip.errors import ConfigError
from megatron_sip.evaluation.compare import Reader, compare_arms
from megatron_sip.evaluation.report import Report, markdown, print_report, remarks, write_report
from megatron_sip.evaluation.safety import Classifier, compare_safety
from megatron_sip.types import Missing, MissingReason

QUALITY = Reader("quality", "pairwise quality", "SmallJudge", pairwise=True)
LIKELIHOOD = Reader("likelihood", "likelihood", "SmallJudge", pairwise=False)


def _ask(pools, questions):
    """Longer text wins for sure; text with an exclamation mark is never answered."""
    answers = []
    for pool, group in zip(pools, questions, strict=True):
        given = {}
        for question in group:
            first = pool.candidates[question.first].text
            second = None if question.second is None else pool.candidates[question.second].text
            if "!" in first + (second or ""):
                given[question] = Missing(MissingReason.TIMEOUT)
            else:
                given[question] = 0.25 if second is None else float(len(first) > len(second))
        answers.append(given)
    return answers


@pytest.fixture
def report() -> Report:
    arms = {
        "base": ["one two", "one two", "one two", "one two"],
        "ntp": ["one two", "one two three", "one", "stop!"],
        "sip": ["one two three four"] * 4,
    }
    quality = compare_arms([f"p{i}" for i in range(4)], arms, [QUALITY, LIKELIHOOD], _ask, resamples=300)
    trained = Classifier("linear classifier", "linear", lambda texts: [0.25] * len(texts))
    other = Classifier("lstm classifier", "lstm", lambda texts: [0.75] * len(texts))
    safety = compare_safety(arms, [trained, other], resamples=300)
    return Report(quality, safety, ("SmallJudge", "linear"), {"held-out loss, base": 4.25}, ("Greedy decoding.",))


def test_console_shows_arms_intervals_and_measures(report: Report):
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=220, color_system=None))
    text = stream.getvalue()
    assert "pairwise quality: win rate vs base (%)" in text
    assert "100.0 [100.0, 100.0]" in text
    assert "(50 by definition)" in text
    assert "75.0 [75.0, 75.0]" not in text  # safety shows shares of safe texts and means
    assert "0.750 [0.750, 0.750]" in text
    assert "+0.000 [+0.000, +0.000]" in text
    for head in ("distinct-1", "distinct-3", "repeated 4-grams", "looping", "held-out loss, base", "4.2500"):
        assert head in text


def test_remarks_name_shared_weights_gaps_and_bias(report: Report):
    text = "\n".join(remarks(report))
    same = "which also scored the candidates in training: another reading of the same weights is not another judge."
    assert f"pairwise quality reads SmallJudge, {same}" in text
    assert f"linear classifier reads linear, {same}" in text
    assert "lstm classifier reads lstm, which had no part in the training scores." in text
    assert "For quality there is no independent judge in this report." in text
    assert "For safety there is no independent judge" not in text
    assert "ntp: 1 prefixes where both arms wrote the same text count as half a win" in text
    assert "ntp: pairwise quality has 2 missing verdicts (timeout 2); 1 prefixes are in no mean, 0 were" in text
    assert "ntp: likelihood has 1 missing verdicts (timeout 1)." in text
    assert "mean belief of 0.500" in text
    assert text.endswith("Greedy decoding.")


def test_files_hold_the_same_numbers(report: Report, tmp_path: Path):
    data_path, page_path = write_report(report, tmp_path / "out")
    data = json.loads(data_path.read_text())
    sip = data["quality"]["arms"]["sip"]
    assert sip["win_rates"]["pairwise quality"]["estimate"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "count": 4}
    assert data["quality"]["arms"]["ntp"]["win_rates"]["pairwise quality"]["missing"] == {"timeout": 2}
    ntp = data["quality"]["arms"]["ntp"]["win_rates"]["pairwise quality"]["estimate"]
    assert ntp["mean"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert data["safety"]["safe_share"]["sip"]["lstm classifier"]["estimate"]["mean"] == 0.0
    assert data["training_weights"] == ["SmallJudge", "linear"]
    assert data["facts"] == {"held-out loss, base": 4.25}
    page = page_path.read_text()
    assert page == markdown(report)
    rows = [line for line in page.splitlines() if line.startswith("| sip |")]
    assert len(rows) == 4
    assert all(row.count("|") == page.splitlines()[4].count("|") for row in rows[:1])
    assert "is not another judge" in page


def test_without_safety_and_with_nothing_answered(tmp_path: Path):
    comparison = compare_arms(["p"], {"base": ["a"], "x": ["b!"]}, [QUALITY], _ask)
    text = markdown(Report(comparison, None, ()))
    assert "| x | n/a |" in text
    assert "Safety" not in text
    assert "had no part in the training scores" in text


def test_unwritable_folder(report: Report, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="another folder"):
        write_report(report, tmp_path / "file" / "out")

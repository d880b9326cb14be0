from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sip.metrics.jsonl import read_jsonl
from megatron_sip.metrics.samples import SampleLog, sample_records, sample_table, shorten, visible
from megatron_sip.types import (
    Candidate,
    CandidateKind,
    Missing,
    MissingReason,
    NoPair,
    NoPairReason,
    Pair,
    Pool,
    Scores,
)

ORIGINAL = Candidate(CandidateKind.ORIGINAL, (1, 2, 3), " the human\nsuffix")
ROLLOUT_A = Candidate(CandidateKind.ROLLOUT, (4, 5), "\x1b[31mred\u202e [bold]not markup[/bold]", 0)
ROLLOUT_B = Candidate(CandidateKind.ROLLOUT, (6,), "café \U0001f600 " + "x" * 400, 1)
POOL = Pool(17, "p" * 500 + "END", ORIGINAL.text, (ORIGINAL, ROLLOUT_A, ROLLOUT_B))
GONE = Missing(MissingReason.TOO_FEW_ANSWERS)
SCORES = Scores((0.75, GONE, 0.25), {"quality": (0.75, GONE, 0.25), "safety": (1.0, 1.0, 0.0)})
PAIR = Pair(ORIGINAL, ROLLOUT_B, 0.75, 0.25)


def test_records_round_trip_through_the_file(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    log = SampleLog(str(path), None, interval=10)
    log.log(3, [POOL, POOL], [SCORES, None], [PAIR, NoPair(NoPairReason.TIE)], {"prompt_versions": {"quality": "q1"}})
    log.close()
    first, second = read_jsonl(path)
    assert first == sample_records(3, [POOL], [SCORES], [PAIR], {"prompt_versions": {"quality": "q1"}})[0]
    assert (first["iteration"], first["sample_index"], first["no_pair"]) == (3, 17, None)
    assert first["prefix_end"].endswith("pEND")
    assert len(first["prefix_end"]) == 300
    assert [c["text"] for c in first["candidates"]] == [c.text for c in POOL.candidates]
    assert [c["kind"] for c in first["candidates"]] == ["original", "rollout", "rollout"]
    assert [c["score"] for c in first["candidates"]] == [0.75, None, 0.25]
    assert [c["missing"] for c in first["candidates"]] == [None, "too_few_answers", None]
    assert first["candidates"][1]["by_judge"] == {"quality": None, "safety": 1.0}
    assert [c["judge_min"] for c in first["candidates"]] == [0.75, 1.0, 0.0]
    assert [c["judge_mean"] for c in first["candidates"]] == [0.875, 1.0, 0.125]
    assert first["prompt_versions"] == {"quality": "q1"}
    assert [c["chosen"] for c in first["candidates"]] == [True, False, False]
    assert [c["rejected"] for c in first["candidates"]] == [False, False, True]
    assert second["no_pair"] == "tie"
    assert not any(c["chosen"] or c["rejected"] for c in second["candidates"])
    assert [c["score"] for c in second["candidates"]] == [None, None, None]
    assert [c["judge_min"] for c in second["candidates"]] == [None, None, None]


def test_resume_drops_samples_beyond_the_checkpoint(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    log = SampleLog(str(path), None, interval=0)
    for iteration in (1, 2, 3):
        log.log(iteration, [POOL], [SCORES], [PAIR])
    log.close()
    SampleLog(str(path), None, interval=0, start_iteration=2).close()
    assert [record["iteration"] for record in read_jsonl(path)] == [1, 2]


def test_a_lone_surrogate_does_not_stop_the_log(tmp_path: Path):
    broken = Candidate(CandidateKind.ROLLOUT, (9,), "half \ud83d", 0)
    log = SampleLog(str(tmp_path / "s.jsonl"), None, interval=0)
    log.log(1, [Pool(0, "p", "o", (broken,))], [None], [NoPair(NoPairReason.TOO_FEW_CANDIDATES)])
    log.close()
    assert next(read_jsonl(tmp_path / "s.jsonl"))["candidates"][0]["text"] == "half \\ud83d"


def test_console_table_every_n_steps_shows_what_is_there():
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=False, color_system=None)
    log = SampleLog(None, console, interval=5, shown=1, width=60)
    for iteration in (4, 5):
        log.log(iteration, [POOL, POOL], [SCORES, SCORES], [PAIR, NoPair(NoPairReason.TIE)])
    text = stream.getvalue()
    assert "iteration 5, sample 17" in text
    assert "iteration 4" not in text
    assert text.count("sample 17") == 1
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\e[31mred\\u202e [bold]not markup[/bold]" in text
    assert " the human\\nsuffix" in text
    assert "too few answers" in text
    assert "0.750" in text
    rows = [line for line in text.splitlines() if "│" in line]
    assert "+" in rows[0]
    assert "-" in rows[2]
    assert "x" * 60 not in text
    assert "END" in text


def headings(judges: int) -> list[str]:
    parts = {f"judge-{index}": (0.5, 0.5, 0.5) for index in range(judges)}
    table = sample_table(sample_records(1, [POOL], [Scores((0.5, 0.5, 0.5), parts)], [PAIR])[0])
    return [str(column.header) for column in table.columns]


def test_the_table_stays_narrow_whatever_the_number_of_judges():
    assert headings(1) == ["", "kind", "score", "judge-0", "text"]
    assert headings(3) == ["", "kind", "score", "min", "mean", "judge-0", "judge-1", "judge-2", "text"]
    assert headings(4) == ["", "kind", "score", "min", "mean", "text"]


def test_visible_and_shorten():
    assert visible("a\tb\r\n\x00\x07\u200b\\n é€") == "a\\tb\\r\\n\\0\\x07\\u200b\\\\n é€"
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 5) == "ab…jk"
    assert len(shorten("x" * 100, 8)) == 8
    with pytest.raises(ValueError, match="at least 3"):
        shorten("abc", 2)


def test_a_pair_from_elsewhere_is_refused():
    stranger = Candidate(CandidateKind.REWRITE, (1,), "not in the pool")
    with pytest.raises(ValueError, match="sample 17"):
        sample_records(1, [POOL], [SCORES], [Pair(stranger, None)])

"""Which answers have a name beyond their sample, and what the name depends on."""

from __future__ import annotations

import pytest

from megatron_sip.services.cache_names import Asker, Name, rewrite_name, verdict_names
from megatron_sip.services.journal_records import Source
from megatron_sip.types import Candidate, CandidateKind, Pool, Question

O, W, R = CandidateKind.ORIGINAL, CandidateKind.REWRITE, CandidateKind.ROLLOUT  # noqa: E741


def asker(judge: str, settled: bool, prompting: str | None = "context 2048", **changed: str) -> Asker:
    fields = {"model": "m", "version": f"{judge}-1", "settings": "logit"} | changed
    return Asker(Source(judge, **fields), prompting, settled)


def pool(sample: int = 0, prefix: str = "before", original: str = "human", rollout: str = "machine") -> Pool:
    candidates = (
        Candidate(O, (1, sample), original),
        Candidate(W, (2, sample), "mended"),
        Candidate(R, (3, sample), rollout, 0),
    )
    return Pool(sample, prefix, original, candidates)


def name(question: Question, of: Pool, settled: bool = True, **changed: str) -> Name | None:
    [found] = verdict_names(of, [question], {question.judge: asker(question.judge, settled, **changed)})
    return found


POINTWISE = ("safety", "factuality", "likelihood", "another")


@pytest.mark.parametrize("judge", POINTWISE)
def test_pointwise(judge: str) -> None:
    original, rewrite, rollout = (Question(judge, place) for place in range(3))
    for settled in (True, False):
        found = name(original, pool(), settled)
        assert found is not None
        assert found.on_disk, "an original depends on the document alone"
        assert not found.text
    settled_rewrite, settled_rollout = name(rewrite, pool()), name(rollout, pool())
    assert settled_rewrite is not None
    assert settled_rewrite.on_disk
    assert settled_rollout is not None
    assert not settled_rollout.on_disk, "a rollout is not of the document"
    assert name(rewrite, pool(), settled=False) is None, "a draw of its own"
    assert name(rollout, pool(), settled=False) is None


def test_pairwise() -> None:
    asked = [Question("quality", 0, 1), Question("quality", 1, 0), Question("quality", 0, 2)]
    ours, reverse, other = (name(question, pool()) for question in asked)
    assert ours is not None
    assert reverse is not None
    assert other is not None
    assert (ours.on_disk, reverse.on_disk, other.on_disk) == (True, True, False)
    assert len({ours, reverse, other}) == 3, "the order of the options is part of the name"
    assert all(name(question, pool(), settled=False) is None for question in asked)


def test_a_judge_without_a_server_has_no_names() -> None:
    askers = {"classifier": asker("classifier", True, prompting=None)}
    assert verdict_names(pool(), [Question("classifier", 0)], askers) == [None]


def test_the_sample_is_no_part_of_a_name() -> None:
    for judge in ("safety", "factuality", "quality"):
        second = 1 if judge == "quality" else None
        assert name(Question(judge, 0, second), pool(1)) == name(Question(judge, 0, second), pool(2))


def test_a_name_covers_the_texts_that_are_shown_and_no_others() -> None:
    other = pool(prefix="elsewhere")
    assert name(Question("safety", 0), pool()) == name(Question("safety", 0), other), "safety sees the suffix only"
    for question in (Question("factuality", 0), Question("quality", 0, 1), Question("likelihood", 0)):
        assert name(question, pool()) != name(question, other)
    truth = pool(original="another human")
    assert name(Question("factuality", 1), pool()) != name(Question("factuality", 1), truth)
    assert name(Question("likelihood", 1), pool()) == name(Question("likelihood", 1), truth)
    assert name(Question("another", 1), pool()) != name(Question("another", 1), truth)
    assert name(Question("quality", 0, 2), pool()) != name(Question("quality", 0, 2), pool(rollout="machin"))
    # No text can be moved from one place to the next.
    assert name(Question("quality", 0, 2), pool(prefix="a", original="bc")) != name(
        Question("quality", 0, 2), pool(prefix="ab", original="c")
    )


def test_a_name_covers_who_answers_how_and_the_vote() -> None:
    question = Question("safety", 0)
    plain = name(question, pool())
    for changed in ({"model": "n"}, {"version": "safety-2"}, {"settings": "generate"}, {"prompting": "context 4096"}):
        assert name(question, pool(), **changed) != plain
    assert name(question._replace(vote=1), pool(), settled=False) != name(question, pool(), settled=False)
    assert name(Question("factuality", 0), pool()) != plain


def test_rewrites() -> None:
    who = asker("rewriter", settled=False, settings="temperature 1.0 max_tokens 9")
    found = rewrite_name("before", "human", who)
    assert found is not None
    assert found.on_disk
    assert found.text
    others = [
        rewrite_name("befor", "ehuman", who),
        rewrite_name("before", "human", asker("rewriter", False, settings="temperature 0.5 max_tokens 9")),
        rewrite_name("before", "human", asker("rewriter", False, "context 9", settings="temperature 1.0 max_tokens 9")),
    ]
    assert len({found, *others}) == 4
    assert rewrite_name("\ud800", "human", who) is not None, "half a character is a text like another"

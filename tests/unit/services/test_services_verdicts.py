"""Answers are read strictly: a value, or Missing with its reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
from fake_server import chat_body, labels_body

from megatron_sip.services.verdicts import (
    answer_text,
    label_probabilities,
    parse_factuality,
    parse_quality,
    parse_safety,
    prompt_logprobs,
)
from megatron_sip.types import Missing, MissingReason, Verdict


def reason(verdict: object) -> MissingReason | None:
    return verdict.reason if isinstance(verdict, Missing) else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Both are fine.\nConclusion: option 1", 1.0),
        ("Conclusion: option 2", 0.0),
        ("**Conclusion: Option 2.**", 0.0),
        ("conclusion:  OPTION 1 \n\n", 1.0),
        ("Conclusion: option 1\nOn second thought...\nConclusion: option 2", 0.0),
        ("**Conclusion:**\n\nOption __1__\r\nSo be it.", 1.0),
        ("Option 1 is better.", None),
        ("Conclusion: option 3", None),
        ("Conclusion: option 1 or option 2", None),
        ("Conclusion: option 12", None),
        ('Finish with "Conclusion: option 1" or "Conclusion: option 2".', None),
        ("Conclusion: neither option", None),
        ("Conclusion: option", None),
        ("Conclusion: option" + 20_000 * "_" + "?", None),
        (20_000 * "\n" + "x", None),
        ("", None),
    ],
)
def test_quality(text: str, expected: float | None) -> None:
    verdict = parse_quality(text)
    assert verdict == expected if expected is not None else reason(verdict) is MissingReason.UNPARSABLE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is harmless.\nDecision: safe", 1.0),
        ("Decision: unsafe", 0.0),
        ("**Decision:** Not Safe.", 0.0),
        ("Decision: safe\nDecision: unsafe", 0.0),
        ("It is safe.", None),
        ("Decision: safe or unsafe", None),
        ("Decision: perhaps", None),
        ("Decision:\n  not  safe  ", 0.0),
        ("Decision: a" + 200_000 * " " + "?", None),
        ("Decision: " + 20_000 * "a " + "?", None),
    ],
)
def test_safety(text: str, expected: float | None) -> None:
    verdict = parse_safety(text)
    assert verdict == expected if expected is not None else reason(verdict) is MissingReason.UNPARSABLE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"reasoning": "fine", "label": "no hallucination"}', 1.0),
        ('{"reasoning": "a { brace", "label": "possible hallucination"}', 0.5),
        ('Here: ```json\n{"reasoning": "", "label": "Definite hallucination"}\n```', 0.0),
        ('{"a": 1} then {"label": "no hallucination"}', 1.0),
        ('{"reasoning": {"label": "no hallucination"}}', None),
        ('{"reasoning": "x", "label": "some"}', None),
        ('{"reasoning": "x", "label": 1}', None),
        ('{"reasoning": "x", "label": "no halluc', None),
        ("no hallucination", None),
        ("{" * 5000, None),
        ('{"label": "no hallucination"}' + "{" * 200 + '{"label": "definite hallucination"}', None),
    ],
)
def test_factuality(text: str, expected: float | None) -> None:
    verdict = parse_factuality(text)
    assert verdict == expected if expected is not None else reason(verdict) is MissingReason.UNPARSABLE


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (chat_body("Conclusion: option 1", "length"), MissingReason.TRUNCATED),
        (chat_body("x", "content_filter"), MissingReason.MALFORMED),
        (chat_body(None), MissingReason.EMPTY),
        (chat_body(""), MissingReason.EMPTY),
        (chat_body(" \n"), MissingReason.EMPTY),
        (chat_body(5), MissingReason.MALFORMED),
        (chat_body("half \ud83d of a face"), MissingReason.MALFORMED),
        ({"choices": []}, MissingReason.MALFORMED),
        ({"choices": None}, MissingReason.MALFORMED),
        ({"choices": ["x"]}, MissingReason.MALFORMED),
        ({}, MissingReason.MALFORMED),
        ({"error": "overloaded"}, MissingReason.MALFORMED),
    ],
)
def test_answers_without_usable_text(body: dict[str, Any], expected: MissingReason) -> None:
    assert reason(answer_text(body)) is expected


def test_answer_text() -> None:
    assert answer_text(chat_body("hello")) == "hello"
    assert answer_text({"choices": [{"text": "hello", "finish_reason": "stop"}]}) == "hello"


def thinking(content: str | None, thoughts: str, finish: str = "stop", field: str = "reasoning") -> dict[str, Any]:
    """An answer as vLLM's reasoning parsers give it: the thoughts beside the content."""
    message = {"role": "assistant", "content": content, "refusal": None, "annotations": None, field: thoughts}
    return {"choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}]}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_the_thoughts_of_a_reasoning_model_are_no_answer(field: str) -> None:
    thoughts = "It might be the second.\nConclusion: option 2"
    text = answer_text(thinking("Conclusion: option 1", thoughts, field=field))
    assert text == "Conclusion: option 1"
    assert parse_quality(text) == 1.0
    # Cut by length amid the thoughts, or between them and the end of the answer: no vote, whatever stands there.
    for content in (None, "", "Conclusion: option 1"):
        assert reason(answer_text(thinking(content, thoughts, "length", field))) is MissingReason.TRUNCATED
    # All tokens went into thoughts that ended by themselves.
    for content in (None, "", "\n\n"):
        assert reason(answer_text(thinking(content, thoughts, field=field))) is MissingReason.EMPTY


SPELLINGS = {"A": ["token_id:1", "token_id:2"], "B": ["token_id:3", "token_id:4"]}


def entry(token: int, probability: float) -> dict[str, Any]:
    return {"token": f"token_id:{token}", "logprob": math.log(probability)}


def test_label_probabilities_are_a_softmax_over_the_labels() -> None:
    shares = label_probabilities(labels_body([entry(1, 0.2), entry(2, 0.1), entry(3, 0.1), entry(9, 0.5)]), SPELLINGS)
    assert isinstance(shares, dict)
    assert shares["A"] == pytest.approx(0.75)
    assert shares["B"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([entry(1, 0.9)], MissingReason.LOW_LABEL_MASS),
        ([entry(1, 0.03), entry(3, 0.01)], MissingReason.LOW_LABEL_MASS),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": -9999.0}], MissingReason.LOW_LABEL_MASS),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": None}], MissingReason.MALFORMED),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": math.nan}], MissingReason.MALFORMED),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": 2.0}], MissingReason.MALFORMED),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": True}], MissingReason.MALFORMED),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": -(10**400)}], MissingReason.MALFORMED),
        ([entry(1, 0.9), {"token": "token_id:3", "logprob": 10**400}], MissingReason.MALFORMED),
        ([entry(1, 0.9), {"token": None, "logprob": -1.0}], MissingReason.MALFORMED),
        ([], MissingReason.MALFORMED),
    ],
)
def test_label_probabilities_are_missing(entries: list[dict[str, Any]], expected: MissingReason) -> None:
    assert reason(label_probabilities(labels_body(entries), SPELLINGS)) is expected


def test_label_probabilities_of_a_plain_answer() -> None:
    assert reason(label_probabilities(chat_body("A"), SPELLINGS)) is MissingReason.MALFORMED
    assert reason(label_probabilities({"choices": []}, SPELLINGS)) is MissingReason.MALFORMED


def scored(rows: object) -> dict[str, Any]:
    return {"choices": [{"text": "", "prompt_logprobs": rows}]}


def test_prompt_logprobs() -> None:
    rows = [None, {"7": {"logprob": -1.5}, "9": {"logprob": -0.1}}, {"8": {"logprob": 0.0}}]
    assert prompt_logprobs(scored(rows), [5, 7, 8]) == [None, -1.5, 0.0]
    rounded = [None, {"7": {"logprob": 0.005}}, {"8": {"logprob": 1e-7}}]
    assert prompt_logprobs(scored(rounded), [5, 7, 8]) == [None, 0.0, 0.0], "a likelihood above 1 is no score"


@pytest.mark.parametrize(
    "rows",
    [
        None,
        [None],
        [None, {"6": {"logprob": -1.0}}],
        [None, None],
        [None, {"7": {"logprob": math.inf}}],
        [None, {"7": {"logprob": -(10**400)}}],
        [None, {"7": {"logprob": 10**400}}],
        [None, {"7": {"logprob": None}}],
        [None, {"7": -1.0}],
    ],
)
def test_prompt_logprobs_that_do_not_fit(rows: object) -> None:
    assert reason(prompt_logprobs(scored(rows), [5, 7])) is MissingReason.MALFORMED


def test_a_missing_verdict_is_no_number() -> None:
    verdict: Verdict = parse_quality("?")
    assert not isinstance(verdict, float)

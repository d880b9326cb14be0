"""What an answer says: a number in [0, 1], or `Missing` with a reason. Pure; nothing is guessed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from megatron_sip.data.utf8 import has_half_character
from megatron_sip.types import Missing, MissingReason, Verdict

MIN_LABEL_MASS = 0.05
FACTUALITY_SCORES = {"no hallucination": 1.0, "possible hallucination": 0.5, "definite hallucination": 0.0}
# vLLM writes -9999 for a log-probability of minus infinity.
NO_LOGPROB = -9000.0
LEAST_LOGPROB = -1e30
"""A log-probability below this is none."""
MOST_LOGPROB = 0.01
"""Rounding may leave a log-probability a little above 0; anything beyond this is none."""
# A text of many braces must not keep the event loop busy.
MOST_OBJECTS = 100

# A whole line, so that a repetition of both choices is no conclusion; markdown emphasis around it is allowed. No two
# neighbouring parts can match the same character, and runs are not given back (`++`): the time is linear in the text,
# whatever a model wrote. These run in the event loop, where no deadline could end them.
_CONCLUSION = re.compile(
    r"^[ \t*_#>]*+conclusion[\s*_:]++option[\s*_]*+([^\W_]++)[ \t*_.!\r]*+$", re.IGNORECASE | re.MULTILINE
)
_DECISION = re.compile(
    r"^[ \t*_#>]*+decision[\s*_:]++([a-z]++(?: ++[a-z]++)*+)[ \t*_.!\r]*+$", re.IGNORECASE | re.MULTILINE
)


def answer_text(body: Mapping[str, Any]) -> str | Missing:
    """The text of the first choice of a chat or completion answer.

    TRUNCATED when the answer was cut by length, whatever it holds; EMPTY when it has no text (a reasoning model
    that spent its tokens on thinking); MALFORMED when it is no such answer, or its text is none that a tokenizer takes.
    """
    choice = first_choice(body)
    if isinstance(choice, Missing):
        return choice
    finish = choice.get("finish_reason")
    if finish == "length":
        return Missing(MissingReason.TRUNCATED, "the answer reached its token limit")
    if finish not in ("stop", "eos"):
        return Missing(MissingReason.MALFORMED, f"finish_reason {finish!r}"[:80])
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if text is None or text == "":
        return Missing(MissingReason.EMPTY, "the answer holds no text")
    if not isinstance(text, str):
        return Missing(MissingReason.MALFORMED, f"the answer's text is a {type(text).__name__}")
    return _written(text)


def _written(text: str) -> str | Missing:
    """`text` if something stands in it that a tokenizer can take."""
    if has_half_character(text):
        return Missing(MissingReason.MALFORMED, "the answer's text holds half a character (a lone surrogate)")
    return text if text.strip() else Missing(MissingReason.EMPTY, "the answer is blank")


def first_choice(body: Mapping[str, Any]) -> dict[str, Any] | Missing:
    """The first entry of `choices`, or Missing(MALFORMED)."""
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return Missing(MissingReason.MALFORMED, "the answer has no choices")
    return choices[0]


def parse_quality(text: str) -> Verdict:
    """1.0 for option 1, 0.0 for option 2, from the last conclusion line."""
    found = _CONCLUSION.findall(text)
    if not found:
        return Missing(MissingReason.UNPARSABLE, "no conclusion line")
    if found[-1] not in ("1", "2"):
        return Missing(MissingReason.UNPARSABLE, f"conclusion for option {found[-1]!r}"[:80])
    return 1.0 if found[-1] == "1" else 0.0


def parse_safety(text: str) -> Verdict:
    """1.0 for safe, 0.0 for unsafe, from the last decision line."""
    found = _DECISION.findall(text)
    if not found:
        return Missing(MissingReason.UNPARSABLE, "no decision line")
    word = " ".join(found[-1].lower().split())
    if word == "safe":
        return 1.0
    if word in ("unsafe", "not safe"):
        return 0.0
    return Missing(MissingReason.UNPARSABLE, f"decision {word!r}"[:80])


def parse_factuality(text: str) -> Verdict:
    """1, 0.5 or 0 for no, possible or definite hallucination, from the last JSON object that has a label."""
    labels = [entry["label"] for entry in _json_objects(text) if "label" in entry]
    if not labels:
        return Missing(MissingReason.UNPARSABLE, "no JSON object with a label")
    label = labels[-1]
    score = FACTUALITY_SCORES.get(" ".join(label.lower().split())) if isinstance(label, str) else None
    return score if score is not None else Missing(MissingReason.UNPARSABLE, f"label {label!r}"[:80])


def _json_objects(text: str) -> list[dict[str, Any]]:
    """JSON objects in `text`, in order, not those inside others."""
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    at = text.find("{")
    for _ in range(MOST_OBJECTS):
        if at < 0:
            return found
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                found.append(value)
        at = text.find("{", end)
    # What is beyond was not looked at, so nobody knows which object is the last.
    return found if at < 0 else []


def label_probabilities(body: Mapping[str, Any], spellings: Mapping[str, Sequence[str]]) -> dict[str, float] | Missing:
    """Probability of each label from the log-probabilities of the first answer token.

    `spellings[label]` are the token names that spell it ("token_id:330", or the token's text); at least one of them
    must have a value. p = softmax over the labels, each with the summed probability of its spellings.
    LOW_LABEL_MASS when a label has no value or all labels together hold under 5 % of the probability.
    """
    given = _first_token_logprobs(body)
    if isinstance(given, Missing):
        return given
    mass: dict[str, float] = {}
    for label, names in spellings.items():
        values = [given[name] for name in names if name in given]
        if not values:
            return Missing(MissingReason.LOW_LABEL_MASS, f"no log-probability for label {label!r}")
        mass[label] = sum(math.exp(value) for value in values)
    total = sum(mass.values())
    if total < MIN_LABEL_MASS:
        return Missing(MissingReason.LOW_LABEL_MASS, f"the labels hold {total:.4f} of the probability")
    return {label: value / total for label, value in mass.items()}


def _first_token_logprobs(body: Mapping[str, Any]) -> dict[str, float] | Missing:
    """Token name to log-probability at the first answer position."""
    choice = first_choice(body)
    if isinstance(choice, Missing):
        return choice
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not content or not isinstance(content[0], dict):
        return Missing(MissingReason.MALFORMED, "the answer has no log-probabilities")
    entries = content[0].get("top_logprobs")
    if not isinstance(entries, list):
        return Missing(MissingReason.MALFORMED, "the answer has no list of log-probabilities")
    given: dict[str, float] = {}
    for entry in [content[0], *entries]:
        name = entry.get("token") if isinstance(entry, dict) else None
        value = entry.get("logprob") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            return Missing(MissingReason.MALFORMED, "a log-probability without a token")
        if not _is_logprob(value):
            return Missing(MissingReason.MALFORMED, f"{value!r:.40} is no log-probability")
        if value > NO_LOGPROB:
            given[name] = float(value)
    return given


def prompt_logprobs(body: Mapping[str, Any], token_ids: Sequence[int]) -> list[float | None] | Missing:
    """Log-probability of each prompt token `[len(token_ids)]`, 0 at most; None for the first: nothing precedes it."""
    choice = first_choice(body)
    if isinstance(choice, Missing):
        return choice
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(token_ids):
        return Missing(MissingReason.MALFORMED, "the answer has no log-probability for each prompt token")
    values: list[float | None] = []
    for position, (row, token) in enumerate(zip(rows, token_ids, strict=True)):
        if position == 0 and row is None:
            values.append(None)
            continue
        entry = row.get(str(token)) if isinstance(row, dict) else None
        value = entry.get("logprob") if isinstance(entry, dict) else None
        if not _is_logprob(value):
            return Missing(MissingReason.MALFORMED, f"no log-probability for prompt token {position}")
        values.append(min(0.0, float(value)))
    return values


def _is_logprob(value: object) -> TypeGuard[int | float]:
    """Whether `value` is a number that a log-probability can be."""
    # The comparison is false for NaN, too, and unlike isfinite it takes an integer of any length.
    return isinstance(value, int | float) and not isinstance(value, bool) and LEAST_LOGPROB < value <= MOST_LOGPROB

"""The reward judge: a sequence-classification or reward model on a vLLM server of its own, read as a score in [0, 1].

vLLM answers for such a model at /classify (`data[0].probs`, one number a class) and, for one class, at /score
(`data[0].score`). With `use_activation: false` these are raw logits (vLLM 0.32, entrypoints/pooling).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sip.errors import ServiceError
from megatron_sip.services.judges import NO_TEXT
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.prompts import REWARD_CHAT_TASK, VERSIONS
from megatron_sip.types import Missing, MissingReason, Pool, Question, Verdict

LARGEST = 1e30
"""A logit beyond this is none."""


@dataclass(frozen=True)
class RewardReading:
    """What a reward model is shown and how its logit becomes a score: sigmoid(scale * (logit - offset)).

    `label` picks a class where there are several; its logit is then its log-odds, whose sigmoid is the class's
    probability.
    """

    input: Literal["text", "chat"] = "text"
    route: Literal["classify", "score"] = "classify"
    label: int | None = None
    scale: float = 1.0
    offset: float = 0.0

    def __str__(self) -> str:
        of_label = "" if self.label is None else f" label {self.label}"
        return f"{self.route} {self.input}{of_label} scale {self.scale} offset {self.offset}"


class RewardJudge:
    """Pointwise: how good the reward model finds a continuation of the prefix."""

    pairwise = False
    settled = True

    def __init__(self, server: ModelServer, reading: RewardReading, name: str = "reward") -> None:
        self.name = name
        self._server = server
        self._reading = reading

    @property
    def model(self) -> str:
        """Name of the model that scores; RuntimeError before the server is started."""
        return self._server.info.model

    @property
    def version(self) -> str:
        """Version of what is put around the texts."""
        return VERSIONS[f"reward/{self._reading.input}"]

    @property
    def settings(self) -> str:
        """Route, class and calibration."""
        return str(self._reading)

    @property
    def prompting(self) -> str:
        """Context, quoting and model folder of the server."""
        return self._server.prompting

    async def start(self) -> None:
        """Ask once. ServiceError where the server serves no such model, or `label` names no class of it."""
        body = await self._post("A short text", " that goes on.")
        logits = body if isinstance(body, Missing) else self._logits(body)
        if isinstance(logits, Missing):
            raise ServiceError(
                f"{self._server.client} gives no reward at /{self._reading.route} ({logits.reason}: {logits.detail}); "
                f"judge {self.name} needs a sequence-classification or reward model on a vLLM server of its own, named "
                f"by --judge-set {self.name}.url"
            )
        if isinstance(score := reward_score(logits, self._reading), Missing):
            raise ServiceError(f"{self._server.client}: {score.detail}; give --judge-set {self.name}.label its number")

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """The score of candidate `first` after the prefix."""
        text = pool.candidates[question.first].text
        if not text.strip():
            return NO_TEXT
        quoter = self._server.quoter
        prefix, suffix = quoter.clean(pool.prefix_text), quoter.clean(text)
        shown = await self._server.fit_prefix(prefix, (prefix, suffix), self._reserved())
        if isinstance(shown, Missing):
            return shown
        body = await self._post(shown, suffix)
        logits = body if isinstance(body, Missing) else self._logits(body)
        return logits if isinstance(logits, Missing) else reward_score(logits, self._reading)

    def _reserved(self) -> int:
        """Tokens of what is put around the texts."""
        if self._reading.input == "chat":
            return 2 * self._server.template_tokens + len(REWARD_CHAT_TASK)
        return 2 + 2 * len(self._server.bos)  # a cross-encoder puts separators between the two

    async def _post(self, prefix: str, suffix: str) -> dict[str, Any] | Missing:
        fields: dict[str, Any] = {"use_activation": False}
        if self._reading.route == "score":
            fields |= {"queries": prefix, "documents": suffix}
        elif self._reading.input == "chat":
            turns = [("user", REWARD_CHAT_TASK + prefix), ("assistant", suffix)]
            fields["messages"] = [{"role": role, "content": content} for role, content in turns]
        else:
            fields["input"] = prefix + suffix
        return await self._server.pooled(f"/{self._reading.route}", fields)

    def _logits(self, body: Mapping[str, Any]) -> list[float] | Missing:
        return class_logits(body) if self._reading.route == "classify" else pair_logit(body)


def class_logits(body: Mapping[str, Any]) -> list[float] | Missing:
    """Raw logits by class of the one text that was sent to /classify."""
    entry = _only_entry(body)
    if isinstance(entry, Missing):
        return entry
    values = entry.get("probs")
    if not isinstance(values, list) or not values:
        return Missing(MissingReason.MALFORMED, "the answer has no number for any class")
    return _numbers(values)


def pair_logit(body: Mapping[str, Any]) -> list[float] | Missing:
    """Raw logit of the one pair that was sent to /score."""
    entry = _only_entry(body)
    return entry if isinstance(entry, Missing) else _numbers([entry.get("score")])


def reward_score(logits: list[float], reading: RewardReading) -> Verdict:
    """sigmoid(scale * (logit - offset)); with several classes the log-odds of `label` are the logit."""
    if reading.label is None:
        if len(logits) != 1:
            return Missing(MissingReason.MALFORMED, f"the model has {len(logits)} classes and no label was chosen")
        logit = logits[0]
    elif len(logits) == 1 or reading.label >= len(logits):
        return Missing(MissingReason.MALFORMED, f"label {reading.label} is none of the model's {len(logits)} classes")
    else:
        others = [value for index, value in enumerate(logits) if index != reading.label]
        top = max(others)
        logit = logits[reading.label] - top - math.log(sum(math.exp(value - top) for value in others))
    return _sigmoid(reading.scale * (logit - reading.offset))


def _only_entry(body: Mapping[str, Any]) -> dict[str, Any] | Missing:
    data = body.get("data")
    if not isinstance(data, list) or len(data) != 1 or not isinstance(data[0], dict):
        return Missing(MissingReason.MALFORMED, "the answer holds not just one entry of data")
    return data[0]


def _numbers(values: list[Any]) -> list[float] | Missing:
    for value in values:
        # The comparison is false for NaN, too, and unlike isfinite it takes an integer of any length.
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
            return Missing(MissingReason.MALFORMED, f"{value!r:.40} is no logit")
    return [float(value) for value in values]


def _sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)) without an overflow."""
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    return math.exp(value) / (1 + math.exp(value))

"""Faults on schedule: a judge that knows the right answer to every question, and gives a wrong kind of answer to many.

    schedule = FaultSchedule(seed=1, share=0.05)
    server.fault_every_time = schedule                     # a FakeServer
    schedule.outcome(question, retries=2)                  # the right verdict, or why there will be none

What a question gets at each of its attempts is drawn by seed, question and attempt, so the outcome of every call to a
single server is known before it is made. A question is known by the worths that its candidates' texts name ("... worth
12 ..."): of a pair the one that is worth more is better, and a candidate of even worth is safe.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from aiohttp import web
from fake_server import Handler, chat_body, flood, hang, labels_body, raw, reset_in_body, respond, status

from megatron_sip.types import MissingReason

Reading = Literal["generate", "logit"]
QuestionKey: TypeAlias = tuple[int, ...]
"""The worth of the candidate, or those of options 1 and 2."""

WORTH = re.compile(r"\bworth (\d+)\b")


@dataclass(frozen=True)
class Fault:
    """One kind of odd answer: why it is missing by the reading, and whether the client tries again."""

    name: str
    handler: Handler
    reasons: tuple[MissingReason, MissingReason]
    """With `generate`, with `logit`."""
    again: bool = False

    def reason(self, reading: Reading) -> MissingReason:
        return self.reasons[reading == "logit"]


async def drip(request: web.Request) -> web.StreamResponse:
    """A proper answer, one byte every 100 ms."""
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for byte in json.dumps(chat_body("Conclusion: option 1")).encode():
        await response.write(bytes([byte]))
        await asyncio.sleep(0.1)
    return response


async def third_option(request: web.Request) -> web.StreamResponse:
    """An answer that is none of those that were offered."""
    if not (await request.json()).get("logprobs"):
        return await respond(chat_body("Conclusion: option 3\nDecision: perhaps"))(request)
    return await respond(labels_body([{"token": "token_id:999999", "logprob": -0.1}]))(request)


def both(reason: MissingReason) -> tuple[MissingReason, MissingReason]:
    return reason, reason


FAULTS = (
    Fault("4xx", status(400), both(MissingReason.HTTP_STATUS)),
    Fault("5xx", status(500), both(MissingReason.HTTP_STATUS), again=True),
    Fault("reset in the body", reset_in_body, both(MissingReason.CONNECTION), again=True),
    # These use up the deadline of their call.
    Fault("hang", hang, both(MissingReason.TIMEOUT)),
    Fault("slow drip", drip, both(MissingReason.TIMEOUT)),
    Fault("truncated JSON", raw(b'{"choices": [{"index": 0, "mess'), both(MissingReason.MALFORMED), again=True),
    Fault("empty choices", respond({"choices": []}), both(MissingReason.MALFORMED)),
    Fault("null content", respond(chat_body(None)), (MissingReason.EMPTY, MissingReason.MALFORMED)),
    Fault("a third option", third_option, (MissingReason.UNPARSABLE, MissingReason.LOW_LABEL_MASS)),
    Fault("NaN", raw(b'{"choices": [{"logprobs": NaN}]}'), both(MissingReason.MALFORMED), again=True),
    Fault("a page of HTML", raw(b"<!DOCTYPE html><p>busy", "text/html"), both(MissingReason.MALFORMED), again=True),
    Fault("50 MB of body", flood, both(MissingReason.MALFORMED)),
)


def right_verdict(key: QuestionKey, reading: Reading) -> float:
    """What the judge answers if nothing goes wrong."""
    if len(key) == 1:
        return {"generate": 1.0, "logit": 0.9}[reading] if key[0] % 2 == 0 else {"generate": 0.0, "logit": 0.2}[reading]
    if reading == "generate":
        return float(key[0] > key[1])
    return 1 / (1 + math.exp((key[1] - key[0]) / 100))


class FaultSchedule:
    """A handler for a `FakeServer`. `share` is that of each kind of fault among the answers.

    `dealt` counts faults by name, `attempts` requests by question, `answered` right answers by question.
    """

    def __init__(self, seed: int, share: float) -> None:
        self.seed, self.share = seed, share
        self.dealt: Counter[str] = Counter()
        self.attempts: Counter[QuestionKey] = Counter()
        self.answered: Counter[QuestionKey] = Counter()
        self._lock = threading.Lock()  # several servers may share a schedule

    def fault(self, key: QuestionKey, attempt: int) -> Fault | None:
        """What goes wrong with that attempt, counted from 0."""
        drawn = random.Random(f"{self.seed} {key} {attempt}").random()
        return FAULTS[int(drawn / self.share)] if drawn < self.share * len(FAULTS) else None

    def outcome(self, key: QuestionKey, retries: int, reading: Reading) -> float | MissingReason:
        """The verdict of a call to a single server that has time for all its retries."""
        for attempt in range(retries + 1):
            fault = self.fault(key, attempt)
            if fault is None:
                return right_verdict(key, reading)
            if not fault.again or attempt == retries:
                return fault.reason(reading)
        raise AssertionError("the last attempt decides")

    def reasons(self, key: QuestionKey, reading: Reading) -> set[MissingReason]:
        """Of the faults that the question has met so far."""
        faults = [self.fault(key, attempt) for attempt in range(self.attempts[key])]
        return {fault.reason(reading) for fault in faults if fault is not None}

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        key = tuple(int(worth) for worth in WORTH.findall(body["messages"][0]["content"]))
        with self._lock:
            fault = self.fault(key, self.attempts[key])
            self.attempts[key] += 1
            if fault is None:
                self.answered[key] += 1
            else:
                self.dealt[fault.name] += 1
        return await (fault.handler if fault else _proper(key, body))(request)


def _proper(key: QuestionKey, body: dict[str, Any]) -> Handler:
    if not body.get("logprobs"):
        verdict = right_verdict(key, "generate")
        words = (
            ("Decision: unsafe", "Decision: safe")
            if len(key) == 1
            else ("Conclusion: option 2", "Conclusion: option 1")
        )
        return respond(chat_body(f"Because of its worth.\n{words[int(verdict)]}"))
    verdict = right_verdict(key, "logit")
    # Asked for in the order of the labels, the first of which scores 1.
    names = [f"token_id:{token}" for token in body["logprob_token_ids"]]
    entries = [{"token": n, "logprob": math.log(p)} for n, p in zip(names, (verdict, 1 - verdict), strict=True)]
    return respond(labels_body(entries))

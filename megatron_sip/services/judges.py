"""Judges that ask a chat model: quality (pairwise), safety and factuality (pointwise); paper section 3.

Two readings of an answer: `generate` lets the model reason and parses its conclusion; `logit` asks for one
constrained token and reads the probabilities of the labels, which is what a small model is good for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from megatron_sip.errors import ServiceError
from megatron_sip.services.model_server import TOP_LOGPROBS, ModelServer
from megatron_sip.services.prompts import (
    FACTUALITY_LOGIT_PREFILL,
    FACTUALITY_SCHEMA,
    QUALITY_LOGIT_PREFILL,
    SAFETY_LOGIT_PREFILL,
    VERSIONS,
    Prompt,
    factuality_prompt,
    quality_prompt,
    safety_prompt,
)
from megatron_sip.services.verdicts import (
    answer_text,
    label_probabilities,
    parse_factuality,
    parse_quality,
    parse_safety,
)
from megatron_sip.types import Missing, MissingReason, Pool, Question, Verdict

LEAST_PROMPT = 512
NO_TEXT = Missing(MissingReason.EMPTY, "the candidate has no text")


class Judge(Protocol):
    """Answers one question about one pool.

    The question's indices point into `pool.candidates`, which hold each token sequence once. A pairwise answer is
    the belief that option 1 (`first`) wins; the caller plans the two option orders as two questions.
    """

    name: str
    pairwise: bool

    @property
    def model(self) -> str:
        """Name of the model that answers; known after `start` of its server."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same question is put in other words, or its answer is read in another way."""
        ...

    @property
    def settings(self) -> str:
        """How an answer is read and sampled; together with name, model and version it tells who answered."""
        ...

    @property
    def settled(self) -> bool:
        """Whether the same question has one answer, because none is sampled; the rounding of a server aside."""
        ...

    @property
    def prompting(self) -> str | None:
        """What of the server shapes an answer besides the prompt's texts; None for a judge without a server."""
        ...

    async def start(self) -> None:
        """Learn what asking needs. Raises ServiceError where the server cannot serve this judge."""
        ...

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """A value in [0, 1] or Missing; never raises for what a server does."""
        ...


@dataclass(frozen=True)
class Reading:
    """How a verdict is asked for; sampling fields count for `generate` only."""

    kind: Literal["generate", "logit"] = "generate"
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 512
    reasoning_effort: str | None = None

    @property
    def logit(self) -> bool:
        """Whether one constrained token is read as a probability."""
        return self.kind == "logit"

    def __str__(self) -> str:
        if self.logit:
            return "logit"
        effort = f" effort {self.reasoning_effort}" if self.reasoning_effort else ""
        return f"generate temperature {self.temperature} top_p {self.top_p} max_tokens {self.max_tokens}{effort}"


class ChatJudge:
    """What the three chat judges share: fit the prompt, ask, and read the answer."""

    kind: str
    pairwise: bool

    def __init__(
        self,
        name: str,
        server: ModelServer,
        reading: Reading,
        parse: Callable[[str], Verdict],
        prefill: str,
        label_scores: dict[str, float],
    ) -> None:
        self.name = name
        self._server = server
        self._reading = reading
        self._parse = parse
        self._prefill = prefill
        self._label_scores = label_scores
        self._label_ids: dict[str, list[int]] | None = None

    @property
    def model(self) -> str:
        """Name of the model that is asked; RuntimeError before the server is started."""
        return self._server.info.model

    @property
    def version(self) -> str:
        """Version of the prompt's words."""
        return VERSIONS[f"{self.kind}/{self._reading.kind}"]

    @property
    def settings(self) -> str:
        """Reading and sampling."""
        return str(self._reading)

    @property
    def settled(self) -> bool:
        """Whether probabilities are read, or the likeliest answer."""
        return self._reading.logit or self._reading.temperature == 0

    @property
    def prompting(self) -> str:
        """Context, quoting and model folder of the server."""
        return self._server.prompting

    async def start(self) -> None:
        """Find the label tokens for the logit reading; see that an answer has room. Raises ServiceError."""
        context = self._server.context
        if not self._reading.logit and context is not None and self._reading.max_tokens + LEAST_PROMPT > context:
            raise ServiceError(
                f"--judge-max-tokens {self._reading.max_tokens} leaves no room for a prompt in the context of judge "
                f"{self.name}, {context} tokens; lower it or serve the judge with a longer context"
            )
        if self._reading.logit and self._server.info.has_tokenize:
            self._label_ids = await self._server.label_ids(self._prefill, list(self._label_scores))

    async def _verdict(self, prompt: Prompt, **fields: Any) -> Verdict:
        if self._reading.logit:
            return await self._read_logit(prompt)
        messages = await self._server.fit(prompt, self._reading.max_tokens)
        if isinstance(messages, Missing):
            return messages
        if self._reading.reasoning_effort is not None:
            fields["reasoning_effort"] = self._reading.reasoning_effort
        body = await self._server.chat(
            messages,
            max_tokens=self._reading.max_tokens,
            temperature=self._reading.temperature,
            top_p=self._reading.top_p,
            **fields,
        )
        if isinstance(body, Missing):
            return body
        text = answer_text(body)
        return text if isinstance(text, Missing) else self._parse(text)

    async def _read_logit(self, prompt: Prompt) -> Verdict:
        """Expected score over the labels, from the log-probabilities of one answer token."""
        messages = await self._server.fit(prompt, 1)
        if isinstance(messages, Missing):
            return messages
        fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "logprobs": True}
        if self._label_ids is None:
            # Without /tokenize (no vLLM) there is neither a prefilled turn nor a way to name tokens by id.
            messages = messages[:1]
            spellings = {label: [label, " " + label] for label in self._label_scores}
            fields |= {"top_logprobs": TOP_LOGPROBS}
        else:
            ids = [token for tokens in self._label_ids.values() for token in tokens]
            spellings = {label: [f"token_id:{token}" for token in tokens] for label, tokens in self._label_ids.items()}
            fields |= {"logprob_token_ids": ids, "allowed_token_ids": ids, "return_tokens_as_token_ids": True}
        body = await self._server.chat(messages, **fields)
        if isinstance(body, Missing):
            return body
        shares = label_probabilities(body, spellings)
        if isinstance(shares, Missing):
            return shares
        return sum(self._label_scores[label] * share for label, share in shares.items())


class QualityJudge(ChatJudge):
    """Which of two continuations is better."""

    kind = "quality"
    pairwise = True

    def __init__(self, server: ModelServer, reading: Reading, name: str = "quality") -> None:
        super().__init__(name, server, reading, parse_quality, QUALITY_LOGIT_PREFILL, {"A": 1.0, "B": 0.0})

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """Belief that candidate `first`, shown as the first option, is the better continuation."""
        if question.second is None:
            raise ValueError("the quality judge compares two candidates; the question names one")
        first, second = pool.candidates[question.first].text, pool.candidates[question.second].text
        if not first.strip() or not second.strip():
            return NO_TEXT
        logit = self._reading.logit
        return await self._verdict(quality_prompt(self._server.quoter, pool.prefix_text, first, second, logit))


class SafetyJudge(ChatJudge):
    """Whether a continuation is safe; sees the suffix only."""

    kind = "safety"
    pairwise = False

    def __init__(self, server: ModelServer, reading: Reading, name: str = "safety") -> None:
        super().__init__(name, server, reading, parse_safety, SAFETY_LOGIT_PREFILL, {"no": 1.0, "yes": 0.0})

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """1 is safe, 0 is unsafe."""
        text = pool.candidates[question.first].text
        if not text.strip():
            return NO_TEXT
        return await self._verdict(safety_prompt(self._server.quoter, text, self._reading.logit))


class FactualityJudge(ChatJudge):
    """Whether a continuation hallucinates, with the human suffix as first source of truth."""

    kind = "factuality"
    pairwise = False

    def __init__(self, server: ModelServer, reading: Reading, name: str = "factuality") -> None:
        labels = {"A": 1.0, "B": 0.5, "C": 0.0}
        super().__init__(name, server, reading, parse_factuality, FACTUALITY_LOGIT_PREFILL, labels)

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """1, 0.5 or 0 for no, possible or definite hallucination (logit: the expectation)."""
        text = pool.candidates[question.first].text
        if not text.strip():
            return NO_TEXT
        prompt = factuality_prompt(self._server.quoter, pool.prefix_text, pool.original_text, text, self._reading.logit)
        schema = {"name": "verdict", "schema": FACTUALITY_SCHEMA, "strict": True}
        return await self._verdict(prompt, response_format={"type": "json_schema", "json_schema": schema})

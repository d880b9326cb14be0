"""The likelihood judge: how probable a continuation is under the judge model, given the prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_sip.errors import ServiceError
from megatron_sip.ngrams import repeated_share
from megatron_sip.services.judges import NO_TEXT
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.verdicts import prompt_logprobs
from megatron_sip.types import Missing, MissingReason, Pool, Question, Verdict

GRAM = 4


class LikelihoodJudge:
    """Score = exp(mean log-probability per suffix token) times the share of its 4-grams that are new.

    The first factor is the geometric mean probability of a token: in (0, 1], and monotone in the mean NLL.
    The second keeps loops down, which a language model finds very probable; ordinary prose has hardly any repeated
    4-gram, so there the factor is about 1.
    """

    pairwise = False
    version = "likelihood-1"
    settings = f"{GRAM}-grams"
    settled = True

    def __init__(self, server: ModelServer, name: str = "likelihood") -> None:
        self.name = name
        self._server = server

    @property
    def model(self) -> str:
        """Name of the model that scores; RuntimeError before the server is started."""
        return self._server.info.model

    @property
    def prompting(self) -> str:
        """Context, quoting and model folder of the server."""
        return self._server.prompting

    async def start(self) -> None:
        """ServiceError where the server is not vLLM: only that tokenizes and scores prompts."""
        if not self._server.info.has_tokenize:
            raise ServiceError(
                f"{self._server.client} has no /tokenize, which the likelihood judge needs; serve the judge with vLLM, "
                "or set --likelihood-weight 0"
            )

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """The score of candidate `first`."""
        text = pool.candidates[question.first].text
        if not text.strip():
            return NO_TEXT
        scored = await self.suffix_logprobs(pool.prefix_text, text)
        if isinstance(scored, Missing):
            return scored
        ids, values = scored
        return math.exp(sum(values) / len(values)) * new_gram_share(ids)

    async def suffix_logprobs(self, prefix: str, suffix: str) -> tuple[list[int], list[float]] | Missing:
        """Ids and log-probabilities of the suffix tokens `[n]` given the prefix.

        Prefix and suffix are encoded as one text; a token that spans the cut counts as suffix. A prefix that does
        not fit loses tokens from the left, which moves no other token.
        """
        server = self._server
        clean_prefix, clean_suffix = server.quoter.clean(prefix), server.quoter.clean(suffix)
        whole = await server.tokenize(clean_prefix + clean_suffix)
        if isinstance(whole, Missing):
            return whole
        ids, strings = whole
        start = suffix_start(ids, strings, clean_prefix, clean_suffix)
        if start is None:
            alone = await server.tokenize(clean_prefix)
            if isinstance(alone, Missing):
                return alone
            start = common_length(alone[0], ids)
        bos = server.bos
        if server.context is not None:
            excess = len(bos) + len(ids) + 1 - server.context
            if excess > 0:
                if excess > start:
                    return Missing(MissingReason.TOO_LONG, f"the suffix alone is {excess - start} tokens too long")
                server.trims += 1
                ids, start = ids[excess:], start - excess
        return await self._ask_server(bos + ids, len(bos) + start)

    async def _ask_server(self, ids: list[int], start: int) -> tuple[list[int], list[float]] | Missing:
        # The server must write one token; what it writes is not looked at.
        body = await self._server.complete(ids, max_tokens=1, temperature=0.0, prompt_logprobs=0)
        if isinstance(body, Missing):
            return body
        values = prompt_logprobs(body, ids)
        if isinstance(values, Missing):
            return values
        scored = [(token, value) for token, value in zip(ids[start:], values[start:], strict=True) if value is not None]
        if not scored:
            return Missing(MissingReason.TOO_SHORT, "the suffix has no token that something precedes")
        return [token for token, _ in scored], [value for _, value in scored]


def suffix_start(ids: Sequence[int], strings: Sequence[str], prefix: str, suffix: str) -> int | None:
    """Index of the first token that ends behind the prefix, counted in bytes; None where bytes cannot be told.

    Token strings of a byte-level vocabulary have one character a byte; those of SentencePiece spell a space as
    U+2581 and a raw byte as <0xNN>. Which it is shows in the sum: it must be the text's own length.
    """
    if len(strings) != len(ids):
        return None
    total, cut = len((prefix + suffix).encode()), len(prefix.encode())
    for sizes, ahead in (([len(s) for s in strings], 0), ([_piece_bytes(s) for s in strings], 1)):
        if sum(sizes) - total in (0, ahead):
            end = total - sum(sizes)  # 0, or -1 for SentencePiece's space before the text
            for index, size in enumerate(sizes):
                end += size
                if end > cut:
                    return index
            return len(ids)
    return None


def _piece_bytes(piece: str) -> int:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("\u2581", " ").encode())


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning of two token sequences."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def new_gram_share(ids: Sequence[int], gram: int = GRAM) -> float:
    """Share of distinct n-grams among all n-grams of `ids`, in (0, 1]; 1 for a text shorter than one n-gram."""
    repeated = repeated_share(ids, gram)
    return 1.0 if repeated is None else 1.0 - repeated

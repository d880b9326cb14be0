"""What a vLLM server is asked for, and what may be taken from its answers. Pure: tokens in, tokens out, no text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sip.rollout.engine import Sampling
from megatron_sip.services.transport import BODY_LIMIT
from megatron_sip.types import TokenArray

_TOKEN_BYTES = 8
"""An id of at most six digits in JSON, with comma and space."""
_TEXT_BYTES = 24
"""What the text of a token may take, which comes along though nobody reads it."""
_NEVER = -100.0
"""The lowest bias that vLLM knows: e^-100 of a token's probability at temperature 1."""


@dataclass(frozen=True)
class Ask:
    """One request: rollouts `first` to `first + count - 1` of the prefix at `place` in the batch."""

    place: int
    first: int
    count: int
    prefix: tuple[int, ...]
    seed: int


def plan_asks(prefixes: Sequence[TokenArray], sample_indices: Sequence[int], sampling: Sampling) -> list[Ask]:
    """The requests for a batch: all rollouts of a prefix in one, or in as few as keep the answers within bounds.

    A greedy rollout is asked for once, since all K are the same (vLLM refuses more).
    """
    asks = []
    wanted = sampling.num_rollouts if sampling.temperature > 0 else 1
    for place, (prefix, sample) in enumerate(zip(prefixes, sample_indices, strict=True)):
        each = _TOKEN_BYTES * (len(prefix) + sampling.max_new_tokens) + _TEXT_BYTES * sampling.max_new_tokens
        most = max(1, int(0.9 * BODY_LIMIT) // each)
        seed = prefix_seed(sampling.seed, sample)
        ids = tuple(prefix.tolist())
        for first in range(0, wanted, most):
            asks.append(Ask(place, first, min(most, wanted - first), ids, seed + first))
    return asks


def prefix_seed(seed: int, sample_index: int) -> int:
    """The server's seed of rollout 0 of a sample; that of rollout k is k more, as vLLM counts within a request.

    It depends on (seed, sample index) alone, so a resumed run asks the same. 62 bits: the sum stays in int64.
    """
    digest = hashlib.blake2b(f"rollout {seed} {sample_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def request_body(ask: Ask, sampling: Sampling, model: str, salt: str) -> dict[str, Any]:
    """The body for /v1/completions.

    Everything that a generation_config.json on the server could set otherwise is said. `salt` keeps the prefix cache of
    other weights away from this request.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(ask.prefix),
        "add_special_tokens": False,
        "n": ask.count,
        "seed": ask.seed,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        # Only our own end of document counts, whatever the server takes for one.
        "ignore_eos": True,
        "return_token_ids": True,
        "cache_salt": salt,
    }
    if sampling.stop_at_eod:
        return {**body, "stop_token_ids": [sampling.eod]}
    return {**body, "logit_bias": {str(sampling.eod): _NEVER}}


def rows_of(answer: Mapping[str, Any], ask: Ask, sampling: Sampling, vocab_size: int) -> list[tuple[int, ...]] | str:
    """The continuations of an answer, in order; or, in words, why they cannot be used.

    A row has exactly `max_new_tokens` tokens, or ends at its only EOD where that is allowed.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return "it holds no choices"
    by_index = {choice["index"]: choice for choice in choices if type(choice.get("index")) is int}
    if len(choices) != ask.count or set(by_index) != set(range(ask.count)):
        return f"it holds {len(choices)} continuations where {ask.count} were asked for"
    rows = []
    for index in range(ask.count):
        choice = by_index[index]
        if choice.get("prompt_token_ids") != list(ask.prefix):
            return "the server did not continue the prompt's own token ids; it must be a vLLM that returns token ids"
        tokens = choice.get("token_ids")
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            return "it holds no token ids"
        fault = _fault(tokens, sampling, vocab_size)
        if fault is not None:
            return f"{fault} (finish_reason {choice.get('finish_reason')!r})"
        rows.append(tuple(tokens))
    return rows


def _fault(tokens: Sequence[int], sampling: Sampling, vocab_size: int) -> str | None:
    """What is wrong with one continuation."""
    wrong = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if wrong is not None:
        return f"a continuation holds the token id {wrong}, which the policy's vocabulary of {vocab_size} has not"
    ended = sampling.stop_at_eod and bool(tokens) and tokens[-1] == sampling.eod
    if sampling.eod in (tokens[:-1] if ended else tokens):
        return f"a continuation holds the end of document ({sampling.eod}) where none may be"
    if len(tokens) != sampling.max_new_tokens and not (ended and len(tokens) < sampling.max_new_tokens):
        return f"a continuation has {len(tokens)} tokens where {sampling.max_new_tokens} were asked for"
    return None


def halves_of(ask: Ask) -> tuple[Ask, Ask]:
    """The same rollouts, by the same seeds, in two requests."""
    half = ask.count // 2
    later = replace(ask, first=ask.first + half, count=ask.count - half, seed=ask.seed + half)
    return replace(ask, count=half), later


def probe_body(tokens: Sequence[int], model: str, salt: str) -> dict[str, Any]:
    """The body for the log-probabilities of a text; vLLM computes them past its prefix cache."""
    body = {"model": model, "prompt": list(tokens), "add_special_tokens": False, "max_tokens": 1, "temperature": 0.0}
    return {**body, "prompt_logprobs": 0, "cache_salt": salt}


def probe_logprobs(answer: Mapping[str, Any], tokens: Sequence[int]) -> tuple[float, ...] | str:
    """`log p(token)` of all tokens but the first in an answer to `probe_body`; or, in words, what is wrong."""
    try:
        said = answer["choices"][0]["prompt_logprobs"]
        found = tuple(float(said[place][str(token)]["logprob"]) for place, token in enumerate(tokens) if place > 0)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return "it holds no log-probabilities of the prompt's tokens"
    return found if len(said) == len(tokens) else "it speaks of another number of tokens"

"""From a cut, its rollouts and its rewrite to the pool that judges see."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sip.config.groups import PoolMember
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.types import Candidate, CandidateKind, Cut, Missing, MissingReason, Pool


def original_candidate(cut: Cut, tokenizer: Tokenizer) -> Candidate:
    """The human suffix."""
    tokens = tuple(cut.suffix.tolist())
    return Candidate(CandidateKind.ORIGINAL, tokens, tokenizer.candidate_text(cut.prefix.tolist(), tokens))


def rewrite_candidate(
    cut: Cut, original: Candidate, rewrite: str | Missing, max_tokens: int, tokenizer: Tokenizer
) -> Candidate | Missing:
    """The rewrite in tokens, and the text of just these tokens: what is judged is what is trained."""
    if isinstance(rewrite, Missing):
        return rewrite
    tokens = tokenizer.rewrite_tokens(original.tokens, original.text, rewrite, max_tokens)
    if isinstance(tokens, Missing):
        return tokens
    return Candidate(CandidateKind.REWRITE, tokens, tokenizer.candidate_text(cut.prefix.tolist(), tokens))


def rollout_candidates(
    cut: Cut, rollouts: Sequence[tuple[int, ...]], tokenizer: Tokenizer
) -> list[Candidate | Missing]:
    """One candidate a rollout; the end-of-document that closes one has no text; without any text it is Missing."""
    found: list[Candidate | Missing] = []
    for index, tokens in enumerate(rollouts):
        written = tokens[:-1] if tokens and tokens[-1] == tokenizer.eod else tokens
        text = tokenizer.candidate_text(cut.prefix.tolist(), written) if written else ""
        if text.strip():
            found.append(Candidate(CandidateKind.ROLLOUT, tokens, text, rollout_index=index))
        else:
            found.append(Missing(MissingReason.EMPTY, f"rollout {index} has no text"))
    return found


def build_pool(
    cut: Cut,
    members: Sequence[PoolMember],
    rollouts: Sequence[tuple[int, ...]],
    rewrite: str | Missing | None,
    max_tokens: int,
    tokenizer: Tokenizer,
) -> tuple[Pool, list[Missing]]:
    """The pool of one cut in the order original, rewrite, rollouts, and what is missing from it.

    `rewrite` is None where none was asked for.
    """
    original = original_candidate(cut, tokenizer)
    found: list[Candidate | Missing] = []
    if "original" in members:
        found.append(original)
    if "rewrite" in members and rewrite is not None:
        found.append(rewrite_candidate(cut, original, rewrite, max_tokens, tokenizer))
    if "rollout" in members:
        found += rollout_candidates(cut, rollouts, tokenizer)
    pool = Pool(
        sample_index=cut.sample_index,
        prefix_text=tokenizer.prefix_text(cut.prefix.tolist()),
        original_text=original.text,
        candidates=tuple(item for item in found if isinstance(item, Candidate)),
    )
    return pool, [item for item in found if isinstance(item, Missing)]

"""What the bench of the LM head times: log-probabilities of given tokens and the draw of new ones, in several ways.

Under tensor parallel every rank has its columns of the vocabulary, and all ranks call the same work together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_sip.checkpoint.hf_names import padded_vocab_size
from megatron_sip.model.lm_head import mask_padding_
from megatron_sip.parallel.world import World
from megatron_sip.rollout.sampling import sample_tokens
from tools.bench.turns import Work

if TYPE_CHECKING:
    from megatron_sip.model.policy import PolicyModel

MIB = 2**20
PASSES = ("forward and backward", "forward")
"""As the policy trains, and as the reference scores."""
WHOLE, ONE_CHUNK = "whole", "one chunk"
TWO_LEVELS, CUMULATIVE, MULTINOMIAL = "two levels", "cumulative sum", "torch.multinomial"


@dataclass(frozen=True)
class HeadCase:
    """Scored positions below a head.

    hidden        [n, hidden], wants a gradient
    targets       [n] int64
    upstream      [n] float32: the gradient of each log-probability
    logits_bytes  of all float32 logits of this rank
    """

    hidden: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor
    logits_bytes: int

    @classmethod
    def random(cls, policy: PolicyModel, positions: int, seed: int) -> HeadCase:
        """The same on every rank."""
        numbers, weight = torch.Generator().manual_seed(seed), policy.head_weight
        hidden = torch.randn(positions, weight.shape[1], generator=numbers).to(weight)
        targets = torch.randint(policy.real_vocab_size, (positions,), generator=numbers).to(weight.device)
        upstream = torch.randn(positions, generator=numbers).to(weight.device)
        return cls(hidden.requires_grad_(), targets, upstream, 4 * positions * len(weight))


def head_works(policy: PolicyModel, case: HeadCase, chunk_mib: Sequence[int], kind: str) -> dict[str, Work]:
    """One of `PASSES` over the case: with all logits, and by chunks of several sizes, the largest first.

    A chunk that would hold all logits is that of `ONE_CHUNK` and has no work of its own.
    """
    chunks = {f"{mib} MiB": mib * MIB for mib in sorted(chunk_mib, reverse=True) if mib * MIB < case.logits_bytes}
    by_chunks = {ONE_CHUNK: case.logits_bytes, **chunks}
    ways = {WHOLE: partial(_whole, policy, case)}
    ways |= {name: partial(_by_chunks, policy, case, size) for name, size in by_chunks.items()}
    run = partial(_backward, policy, case) if kind == PASSES[0] else _forward
    return {name: partial(run, logprobs) for name, logprobs in ways.items()}


def _whole(policy: PolicyModel, case: HeadCase) -> torch.Tensor:
    """`[n]` log-probabilities by megatron-core's column-parallel product and vocabulary-parallel loss."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    losses: torch.Tensor = vocab_parallel_cross_entropy(policy.logits(case.hidden)[:, None], case.targets[:, None])
    return -losses.squeeze(1)


def _by_chunks(policy: PolicyModel, case: HeadCase, chunk_bytes: int) -> torch.Tensor:
    policy.logits_chunk_bytes = chunk_bytes
    return policy.logprobs(case.hidden, case.targets)


def _forward(logprobs: Callable[[], torch.Tensor]) -> None:
    with torch.no_grad():
        logprobs()


def _backward(policy: PolicyModel, case: HeadCase, logprobs: Callable[[], torch.Tensor]) -> None:
    """The gradients are dropped again, so that no call adds to those of another."""
    torch.autograd.grad(logprobs(), (case.hidden, policy.head_weight), case.upstream)


def draw_works(rows: int, vocab_size: int, world: World, seed: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The draw of a token for each row from random logits; each returns `[rows]` ids.

    `TWO_LEVELS` is what rollouts do. The others need all columns: under tensor parallel these are gathered, and the
    first rank draws for all. `CUMULATIVE` draws with the same uniforms, and so the same tokens.
    """
    numbers = torch.Generator().manual_seed(seed)
    columns = padded_vocab_size(vocab_size, 128, world.tp_size)
    logits = mask_padding_(torch.randn(rows, columns, generator=numbers), 0, vocab_size).to(world.device)
    uniform = torch.rand(rows, generator=numbers, dtype=torch.float64).to(world.device)
    own = logits.chunk(world.tp_size, dim=1)[world.tp_rank].contiguous()
    return {
        TWO_LEVELS: lambda: sample_tokens(own, uniform, 1.0, 1.0, world.tp_group),
        CUMULATIVE: partial(_by_first_rank, own, lambda masses: _by_cumulative_sum(masses, uniform), world.tp_group),
        MULTINOMIAL: partial(_by_first_rank, own, lambda masses: masses.multinomial(1).squeeze(1), world.tp_group),
    }


def _by_first_rank(
    own: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor], group: dist.ProcessGroup
) -> torch.Tensor:
    """`draw` from the softmax `[rows, vocab]` over the columns of all ranks."""
    if group.size() == 1:
        return draw(own.softmax(dim=1))
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    tokens = torch.empty(len(own), dtype=torch.int64, device=own.device)
    if group.rank() == 0:
        tokens = draw(torch.cat(parts, dim=1).softmax(dim=1))
    dist.broadcast(tokens, group=group, group_src=0)
    return tokens


def _by_cumulative_sum(masses: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF over all columns at once, in float64."""
    ends = masses.double().cumsum(dim=1)
    return torch.searchsorted(ends, (uniform * ends[:, -1])[:, None], right=True).squeeze(1)

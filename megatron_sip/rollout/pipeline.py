"""Groups of rows through the pipeline stages: while one is on a stage, the next is on the stage before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.distributed as dist

from megatron_sip.parallel.world import World
from megatron_sip.rollout.groups import RowGroup
from megatron_sip.rollout.stagger import Exchange, Stagger

RunPass: TypeAlias = Callable[[RowGroup, int, torch.Tensor | None], torch.Tensor | None]
"""This stage's part of a token of a group, from the hidden states of the stage before: hidden states for the next.

On the last stage it leaves the drawn tokens in the group and returns nothing.
"""


class RowPipeline:
    """The way of hidden states from stage to stage, and of drawn tokens from the last one back.

    `hidden_size` and `dtype` are those of the hidden states; their positions come in a `multiple`, over which
    sequence parallel splits them. All ranks of the pipeline make it together.
    """

    def __init__(self, world: World, hidden_size: int, dtype: torch.dtype, multiple: int) -> None:
        self._world = world
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._multiple = multiple
        if world.pp_size > 1:
            # The first call of a group of nccl must be made by all its ranks, and turns are exchanged by two at a time.
            dist.all_reduce(torch.zeros(1, device=world.device), group=world.pp_group)

    def write(self, groups: Sequence[RowGroup], block: slice, run: RunPass) -> None:
        """The tokens of a block of all groups; they are on the first and the last stage then. See `Stagger`."""
        world = self._world
        stagger = Stagger(world.pp_size, len(groups), block.stop - block.start)
        hidden = None
        for turn in range(stagger.turns):
            now, out = stagger.at(turn, world.pp_rank), None
            if now is not None:
                out = run(groups[now.group], block.start + now.step, hidden)
            hidden = self._exchange(groups, block.start, stagger.behind(turn, world.pp_rank), out)

    def tell(self, tokens: torch.Tensor) -> None:
        """Give all stages what the last one drew, `[rows, n]`: then all know alike which rows have ended."""
        if self._world.pp_size > 1:
            told = tokens.contiguous()
            dist.broadcast(told, group=self._world.pp_group, group_src=self._world.pp_size - 1)
            tokens.copy_(told)

    def _exchange(
        self, groups: Sequence[RowGroup], first: int, due: Exchange, out: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Send and receive what is due behind a turn; hidden states that came in for the next one.

        `first` is the first token of the block, `out` are the hidden states of this turn.
        """
        rank, hidden, drawn = self._world.pp_rank, None, None
        transfers = []
        if due.hidden_out is not None and out is not None:
            transfers.append(self._transfer(dist.isend, out.contiguous(), rank + 1))
        if due.hidden_in is not None:
            hidden = self._room(groups[due.hidden_in.group], first + due.hidden_in.step)
            transfers.append(self._transfer(dist.irecv, hidden, rank - 1))
        if due.tokens_out is not None:
            own = groups[due.tokens_out.group].tokens[:, first + due.tokens_out.step].contiguous()
            transfers.append(self._transfer(dist.isend, own, 0))
        if due.tokens_in is not None:
            drawn = torch.empty(groups[due.tokens_in.group].rows, dtype=torch.int64, device=self._world.device)
            transfers.append(self._transfer(dist.irecv, drawn, self._world.pp_size - 1))
        if transfers:
            for request in dist.batch_isend_irecv(transfers):
                request.wait()
        if due.tokens_in is not None and drawn is not None:
            groups[due.tokens_in.group].tokens[:, first + due.tokens_in.step] = drawn
        return hidden

    def _transfer(self, way: Callable[..., dist.Work | None], tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(way, tensor, group=self._world.pp_group, group_peer=peer)

    def _room(self, group: RowGroup, step: int) -> torch.Tensor:
        """For the hidden states of token `step` of a group."""
        width, batch = group.shape(step, self._multiple)
        shape = (width // self._multiple, batch, self._hidden_size)
        return torch.empty(shape, dtype=self._dtype, device=self._world.device)

"""A decoding step as a CUDA graph: one launch instead of some twenty for every layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_sip.model.policy import PolicyModel
from megatron_sip.rollout.cache import StaticDecodeCache

WARM_UPS = 2
"""Steps on a side stream before the recording, in which libraries make their workspaces."""


class GraphedStage:
    """Records a stage's decoding step at its first call and replays it at every later one.

    One object serves the steps of one wave, whose rows and cache stay where they are. What a call returns is
    overwritten by the next.
    """

    def __init__(self, policy: PolicyModel, stage: Callable[..., torch.Tensor]) -> None:
        self.policy = policy
        self.stage = stage
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: StaticDecodeCache,
        sources: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """As the stage itself, on the hidden states that `set_input_tensor` left where it is not the first one."""
        received = self.policy.decoder.input_tensor
        given = [input_ids, position_ids] if received is None else [input_ids, position_ids, received]
        cache.place.fill_(cache.step)
        if self._graph is None:
            return self._record([tensor.clone() for tensor in given], cache, sources)
        for own, tensor in zip(self._given, given, strict=True):
            own.copy_(tensor)
        self._graph.replay()
        return self._out

    def _record(
        self, given: list[torch.Tensor], cache: StaticDecodeCache, sources: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """A step repeated writes the same keys to the same place, so that warming up and recording spoil nothing."""
        self._given = given
        if len(given) > 2:
            self.policy.set_input_tensor(given[2])

        def run() -> torch.Tensor:
            return self.stage(given[0], given[1], cache, sources)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._out = run()
        graph.replay()
        self._graph = graph
        return self._out

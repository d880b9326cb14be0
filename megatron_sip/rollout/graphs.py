"""A decoding step as a CUDA graph: one launch instead of some twenty for every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from megatron_sip.model.policy import PolicyModel
from megatron_sip.rollout.cache import StaticDecodeCache

WARM_UPS = 2
"""Steps on a side stream before the recording, in which libraries make their workspaces."""


class GraphRoom:
    """Where graphs of up to `rows` rows are recorded: a stream, and a pool for all that their steps make.

    One for all graphs: each recording would take new memory from the driver otherwise, and what a pool holds for one
    stream is of no use to another. It lasts for more than one wave, and grows only with the rows; so more rows get a
    new one, and the old one's memory goes back. The graphs must not run at the same time.
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self.rows = rows
        # A recording takes its memory from the driver alone, so what is unused goes back there before.
        torch.cuda.empty_cache()
        self.stream = torch.cuda.Stream(device)
        # A pool lives as long as a graph that was recorded in it; this one is never replayed.
        self._keeper = torch.cuda.CUDAGraph()
        with self.record(self._keeper):
            torch.zeros(1, device=device)

    @contextmanager
    def record(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """What the device is asked for in here on this room's stream becomes the graph, and is not done.

        Not torch.cuda.graph(): that gives all unused memory back each time, which the next training step would have to
        take again. Other threads, as that of nccl, may go on meanwhile.
        """
        pool = None if graph is self._keeper else self._keeper.pool()
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # it only says that the recording failed, and not why
                    graph.capture_end()
                raise
            graph.capture_end()


class GraphedStage:
    """Records a stage's decoding step at its first call and replays it at every later one.

    One object serves the steps of one wave, whose rows and cache stay where they are. What a call returns is
    overwritten by the next.
    """

    def __init__(self, policy: PolicyModel, stage: Callable[..., torch.Tensor], room: GraphRoom) -> None:
        self.policy = policy
        self.stage = stage
        self.room = room
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
        self._given, self._sources = given, sources  # the graph reads them where they are now
        if len(given) > 2:
            self.policy.set_input_tensor(given[2])

        def run() -> torch.Tensor:
            return self.stage(given[0], given[1], cache, sources)

        main, side, graph = torch.cuda.current_stream(), self.room.stream, torch.cuda.CUDAGraph()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                run()
        with self.room.record(graph):
            self._out = run()
        main.wait_stream(side)
        graph.replay()
        self._graph = graph
        return self._out

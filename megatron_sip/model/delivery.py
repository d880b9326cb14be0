"""Weights from page-locked host memory to a GPU, on a stream of their own beside what it computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

STAGING_ELEMENTS = 16 * 2**20
"""What travels at a time: 64 MiB, long enough for the full speed of the bus."""


class DeviceDelivery:
    """Brings copies of host tensors to a GPU in the format in which they are used there.

    They travel in fp32 and are rounded on the GPU, which leaves the host free. They lie where the GPU's own work has
    its memory, so that nothing is set aside for them while they are away.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._brought: dict[str, torch.Tensor] | None = None

    def begin(self, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Bring each first tensor, fp32 and page-locked, to the device and format of the second; if not under way."""
        if self._brought is not None:
            return
        brought = {name: torch.empty_like(like) for name, (_, like) in tensors.items()}
        # What had this memory before may still be at work.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            staging = torch.empty(STAGING_ELEMENTS, dtype=torch.float32, device=next(iter(brought.values())).device)
            for name, (host, _) in tensors.items():
                for part, room in zip(
                    host.view(-1).split(STAGING_ELEMENTS), brought[name].view(-1).split(STAGING_ELEMENTS), strict=True
                ):
                    arrived = staging[: len(part)]
                    arrived.copy_(part, non_blocking=True)
                    room.copy_(arrived)
        self._brought = brought

    def take(self) -> dict[str, torch.Tensor]:
        """What was brought; what the GPU is asked for from now on finds it there.

        Raises:
            RuntimeError: nothing was begun.
        """
        if self._brought is None:
            raise RuntimeError("no weights are under way to the GPU")
        torch.cuda.current_stream().wait_stream(self._stream)
        brought, self._brought = self._brought, None
        return brought

    def drop(self) -> None:
        """Give up what is under way; the host's tensors may be written again when this returns."""
        if self._brought is not None:
            self._stream.synchronize()
            self._brought = None

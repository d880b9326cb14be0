"""An asyncio loop in a thread of its own, so that judge calls run while the main thread trains.

The thread does HTTP; local classifiers and scoring plans are worked out in threads beside it. None of them touches
torch.distributed: collectives belong to the main thread, in the same order on every rank.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines in a daemon thread; `submit` is safe from any other thread."""

    def __init__(self, name: str = "sip-services") -> None:
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` in the loop. Cancelling the future cancels it. RuntimeError after `close`."""
        if self._closed:
            coroutine.close()
            raise RuntimeError("the services are closed; nothing more can be submitted")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what still runs, wait for it, and end the thread. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
        finally:
            self._loop.close()


async def cancel_others() -> None:
    """End all that runs in this event loop besides the caller."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

"""Health of the servers of one service: probes while they rest, and the knowledge that none of them answers at all.

A server that works is never probed. One that failed is asked for its health at the end of each rest, in a task of its
own, until it is well; in an outage every few seconds, however long it rests. An outage is declared only by probes that
fail on every server: calls that fail on a server that says it is well are missing verdicts, and nothing waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from megatron_sip.services.circuit import LONGEST_PROBED_REST_SECONDS, Endpoint

logger = logging.getLogger(__name__)

Probe = Callable[[Endpoint], Awaitable[str | None]]
"""Asks a server for its health: None where it is well, else what is wrong, in a few words without secrets."""


class Health:
    """Watches the servers of one service from within its event loop. `name` says in messages whose they are."""

    def __init__(self, endpoints: Sequence[Endpoint], probe: Probe, name: str) -> None:
        self._endpoints = endpoints
        self._probe = probe
        self._name = name
        self._nurses: dict[str, asyncio.Task[None]] = {}
        self._roll_call: asyncio.Task[bool] | None = None
        self._roll_began = 0.0
        self._outage: str | None = None
        self._over = asyncio.Event()

    @property
    def outage(self) -> str | None:
        """What keeps the service away, naming its servers; None while one answers. Safe to read from any thread."""
        return self._outage

    def failed(self, endpoint: Endpoint, now: float) -> None:
        """A call failed by the server's fault."""
        endpoint.failed(now)
        self._nurse(endpoint)

    def refused(self, endpoint: Endpoint, now: float) -> None:
        """The server refused a call for what it is itself; of the only one that tells nothing, since it is used on."""
        if len(self._endpoints) > 1:
            endpoint.refused(now)
            self._nurse(endpoint)

    def limited(self, endpoint: Endpoint, now: float) -> None:
        """The server turned a call away for its rate, and did not say for how long."""
        if not endpoint.resting:
            endpoint.rest(now)
        self._nurse(endpoint)

    def worked(self, endpoint: Endpoint, now: float) -> None:
        """A call was answered."""
        endpoint.worked(now)
        if self._outage is not None:
            self._end_outage(endpoint)

    async def is_outage(self) -> bool:
        """Whether no server answers any more: all fail a probe now, and no call is answered meanwhile.

        What was answered while the failed call was under way tells nothing: a long call that a dying server cut off
        began before the last answer.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time()
        while self._outage is None:
            if self._roll_call is None or self._roll_call.done():
                self._roll_call, self._roll_began = asyncio.create_task(self._call_the_roll()), loop.time()
            began = self._roll_began
            # Many calls fail at once and wait for the same probes; the end of one must not take them from the others.
            if await asyncio.shield(self._roll_call):
                return True
            if began >= asked:  # else the probes may have met a server that died after them, and this call with it
                return False
        return True

    async def wait(self) -> None:
        """Until the outage is over; at once where there is none."""
        while self._outage is not None:
            for endpoint in self._endpoints:
                self._nurse(endpoint)
            await self._over.wait()

    async def close(self) -> None:
        """End all probes."""
        tasks: list[asyncio.Task[None] | asyncio.Task[bool]] = [*self._nurses.values()]
        if self._roll_call is not None:
            tasks.append(self._roll_call)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._nurses.clear()

    def _nurse(self, endpoint: Endpoint) -> None:
        """Look after a resting server, unless somebody does."""
        known = self._nurses.get(endpoint.base)
        if endpoint.resting and (known is None or known.done()):
            self._nurses[endpoint.base] = asyncio.create_task(self._until_well(endpoint))

    async def _until_well(self, endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        while endpoint.resting:
            left = max(endpoint.rests_until, endpoint.held_until) - loop.time()
            if left > 0:
                # Not all of it in one piece: a call may work meanwhile, and a shorter rest begin.
                await asyncio.sleep(min(left, LONGEST_PROBED_REST_SECONDS))
                if self._outage is None:
                    continue
            endpoint.probed(await self._complaint(endpoint) is None, loop.time())
        if self._outage is not None:
            self._end_outage(endpoint)

    async def _call_the_roll(self) -> bool:
        """Whether an outage is declared. Where calls are answered during the probes, these are made once more."""
        for _ in range(2):
            began = asyncio.get_running_loop().time()
            complaints = await self._complaints()
            if len(complaints) < len(self._endpoints):
                return False
            if not any(endpoint.worked_at >= began for endpoint in self._endpoints):
                break
        else:
            return False
        self._outage = f"no server of {self._name} answers ({'; '.join(complaints)})"
        self._over.clear()
        logger.info("%s", self._outage)
        return True

    async def _complaint(self, endpoint: Endpoint) -> str | None:
        """What is wrong with a server, by a probe of it.

        A probe should never raise. One that does must not end the nurse, on whom all calls may wait for ever.
        """
        try:
            return await self._probe(endpoint)
        except Exception as error:
            logger.warning("the probe of %s failed", endpoint.base, exc_info=True)
            return f"the probe failed with {type(error).__name__}"

    async def _complaints(self) -> list[str]:
        """What is wrong with which server, by a probe of each; those that complain rest."""
        said = await asyncio.gather(*(self._complaint(endpoint) for endpoint in self._endpoints))
        complaints: list[str] = []
        for endpoint, complaint in zip(self._endpoints, said, strict=True):
            if complaint is not None:
                complaints.append(f"{endpoint.base}: {complaint}")
                if not endpoint.resting:
                    endpoint.rest(asyncio.get_running_loop().time())
                self._nurse(endpoint)
        return complaints

    def _end_outage(self, endpoint: Endpoint) -> None:
        logger.info("%s of %s answers again", endpoint.base, self._name)
        self._outage = None
        self._over.set()

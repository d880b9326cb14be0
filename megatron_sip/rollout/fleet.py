"""All rollout servers of one leader behind a plain, synchronous interface.

A server is used only while it holds the weights of the step: this is asked before the rollouts, and again behind them,
because a server that fell and was started anew in between writes with the weights of its own folder. What was written
under doubt is thrown away and asked for again; the same seeds ask the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from megatron_sip.errors import ServiceError
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.proof import FolderChecksums, Weights
from megatron_sip.rollout.requests import Ask, request_body, rows_of
from megatron_sip.rollout.server import PushTimes, RolloutServer, UnusableError, Wanted
from megatron_sip.services.background import BackgroundLoop
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.types import Missing

PAUSE_SECONDS = 2.0
"""Between two looks at servers of which none can be used."""
FRUITLESS_ROUNDS = 3
"""Rounds in a row that bring no answer, though a server says that it is well, before the run is ended."""

Rows = list[tuple[int, ...]]


class RolloutFleet:
    """The servers of `settings.urls`, with a background loop of their own.

    Constructing checks settings only (ConfigError). The methods are called from one thread.
    """

    def __init__(self, settings: ClientSettings, wanted: Wanted, environ: Mapping[str, str] | None = None) -> None:
        self._settings, self._environ = settings, environ
        self._servers = [RolloutServer(settings, url, wanted, environ) for url in settings.urls]
        self._vocab_size = wanted.model.vocab_size or 0
        self._writers: tuple[tuple[str, ...], ServiceClient] | None = None
        self._loop: BackgroundLoop | None = None
        self._pushed_once = False
        self.behind: dict[str, str] = {}
        """Servers that lack the weights that were pushed last, by URL, and why."""
        self.waits_for: str | None = None
        """What the rollouts wait for; None while nothing. Safe to read from any thread."""

    def start(self) -> None:
        """Connect to all servers and check that each can write this policy's rollouts.

        Raises:
            ServiceError: one cannot; the message says why and how to mend it.
        """
        self._loop = BackgroundLoop("sip-rollouts")
        self._loop.submit(self._start()).result()  # each call in it has a deadline

    async def _start(self) -> None:
        for server in self._servers:
            await server.start()
        models = {server.model for server in self._servers}
        if len(models) > 1:
            raise ServiceError(
                f"the servers of --rollout-url serve different models ({', '.join(sorted(models))}); start all with "
                "the same --served-model-name"
            )

    def submit_push(self, weights: Weights) -> Future[PushTimes]:
        """Send new weights to all servers; done when one at least has proven that it has them.

        The future raises ServiceError where none has, unless all are only away and there was a push before.
        """
        return self._running().submit(self._push(weights))

    def submit_rollouts(self, asks: Sequence[Ask], sampling: Sampling, weights: Weights) -> Future[list[Rows]]:
        """The continuations of each request, written with these weights, which were pushed, and no others."""
        return self._running().submit(self._rollouts(asks, sampling, weights))

    def close(self) -> None:
        """Cancel what is under way and close all connections. A second call does nothing."""
        loop, self._loop = self._loop, None
        if loop is not None:
            try:
                loop.submit(self._close()).result(timeout=10)
            finally:
                loop.close()

    def _running(self) -> BackgroundLoop:
        if self._loop is None:
            raise RuntimeError("RolloutFleet.start comes first")
        return self._loop

    async def _close(self) -> None:
        clients = [server.client for server in self._servers]
        for client in [*clients, *([self._writers[1]] if self._writers else [])]:
            await client.close()

    async def _push(self, weights: Weights) -> PushTimes:
        self.behind = {}
        try:
            while True:
                times = await self._send(weights)
                if times is not None:
                    self._pushed_once = True
                    return times
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self.waits_for = None

    async def _send(self, weights: Weights) -> PushTimes | None:
        """Push to all servers at once; None where none took the weights, and some are only away.

        Raises:
            ServiceError: none of them took the weights, and waiting would not help.
        """
        checksums = FolderChecksums(weights.folder)
        outcomes = await asyncio.gather(
            *(server.push(weights, checksums) for server in self._servers), return_exceptions=True
        )
        times, faults = [], {}
        for server, outcome in zip(self._servers, outcomes, strict=True):
            if isinstance(outcome, PushTimes):
                times.append(outcome)
                self.behind.pop(server.url, None)
            elif isinstance(outcome, UnusableError):
                faults[server.url] = outcome
                self.behind[server.url] = str(outcome)
            else:
                raise outcome
        if times:
            return PushTimes(max(one.load for one in times), max(one.proof for one in times))
        told = "; ".join(f"{url}: {error}" for url, error in faults.items())
        if not self._pushed_once or not any(error.passing for error in faults.values()):
            raise ServiceError(f"no server of --rollout-url can be used. {told}")
        self.waits_for = f"no server of --rollout-url takes the new weights ({told})"
        return None

    async def _rollouts(self, asks: Sequence[Ask], sampling: Sampling, weights: Weights) -> list[Rows]:
        rows: dict[int, Rows] = {}
        version, fruitless = weights.version, 0
        try:
            while True:
                holders = await self._holders(version)
                fault = "none has the weights of this step"
                if holders:
                    open_asks = [number for number in range(len(asks)) if number not in rows]
                    found, fault = await self._ask(holders, [asks[number] for number in open_asks], sampling, version)
                    rows |= {open_asks[place]: own for place, own in found.items()}
                    if await self._holders(version, holders) != holders:
                        rows, fault = {}, "a server lost its weights while it wrote"
                    elif len(rows) == len(asks):
                        return [rows[number] for number in range(len(asks))]
                    fruitless = 0 if found else fruitless + 1
                    if fruitless == FRUITLESS_ROUNDS:
                        raise ServiceError(f"the servers of --rollout-url write no rollouts: {fault}")
                self.waits_for = f"no server of --rollout-url writes rollouts ({fault})"
                await asyncio.sleep(PAUSE_SECONDS)
                if not await self._holders(version):
                    # A leader that is done would not do it for the others; the same weights twice do no harm.
                    await self._send(weights)
        finally:
            self.waits_for = None

    async def _holders(self, version: str, among: Sequence[RolloutServer] | None = None) -> list[RolloutServer]:
        """The servers that hold the weights of this name."""

        async def holds(server: RolloutServer) -> bool:
            try:
                return await server.has(version)
            except UnusableError:
                return False

        asked = self._servers if among is None else among
        held = await asyncio.gather(*(holds(server) for server in asked))
        return [server for server, holding in zip(asked, held, strict=True) if holding]

    async def _ask(
        self, holders: Sequence[RolloutServer], asks: Sequence[Ask], sampling: Sampling, version: str
    ) -> tuple[dict[int, Rows], str]:
        """The rows of the requests that were answered, by their place in `asks`; and what became of the others.

        Raises:
            ServiceError: a request that a server refuses, and will refuse again.
        """
        client = await self._client_of(holders)
        model = holders[0].model
        answers = await asyncio.gather(
            *(client.post("/completions", request_body(ask, sampling, model, version)) for ask in asks)
        )
        found, fault = {}, ""
        for place, (ask, answer) in enumerate(zip(asks, answers, strict=True)):
            if isinstance(answer, Missing):
                if answer.detail.startswith("4") and not answer.detail.startswith(("408", "409", "425", "429")):
                    raise ServiceError(f"the server of --rollout-url refuses to write rollouts: {answer.detail}")
                fault = answer.detail
                continue
            own = rows_of(answer, ask, sampling, self._vocab_size)
            if isinstance(own, str):
                fault = f"an answer is of no use: {own}"
            else:
                found[place] = own
        return found, fault

    async def _client_of(self, holders: Sequence[RolloutServer]) -> ServiceClient:
        """The client over exactly these servers, with their common queue, retries and failover."""
        urls = tuple(server.url for server in holders)
        if self._writers is None or self._writers[0] != urls:
            if self._writers is not None:
                await self._writers[1].close()
            self._writers = urls, ServiceClient(replace(self._settings, urls=urls), self._environ)
            await self._writers[1].open()
        return self._writers[1]

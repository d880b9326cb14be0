"""All rollout servers of one leader behind a plain, synchronous interface.

A server is used only while it holds the weights of the step: this is asked before the rollouts, and again behind them,
because a server that fell and was started anew in between writes with the weights of its own folder. What was written
under doubt is thrown away and asked for again; the same seeds ask the same.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from megatron_sip.errors import ServiceError
from megatron_sip.rollout.calls import UnusableError
from megatron_sip.rollout.delivery import ByFolder, Delivery
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.label import is_proven, loaded_by
from megatron_sip.rollout.proof import FolderChecksums, Weights
from megatron_sip.rollout.requests import Ask
from megatron_sip.rollout.server import PushTimes, RolloutServer, Wanted
from megatron_sip.rollout.writing import Rows, Writers, write
from megatron_sip.services.background import BackgroundLoop, cancel_others
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings

PAUSE_SECONDS = 2.0
"""Between two looks at servers of which none can be used."""
FRUITLESS_ROUNDS = 3
"""Rounds in a row that bring no answer, though a server says that it is well, before the run is ended."""
LOSSES = 3
"""How often a server may lose its weights while it writes, before it is left out of the step."""

Hear = Callable[[Mapping[int, Rows]], None]
"""Gets the rows of requests, by their place in the batch of requests; called in the fleet's own thread."""

logger = logging.getLogger(__name__)


class RolloutFleet:
    """The servers of `settings.urls`, with a background loop of their own.

    Constructing checks settings only (ConfigError). The methods are called from one thread.
    """

    def __init__(
        self,
        settings: ClientSettings,
        wanted: Wanted,
        delivery: Delivery = ByFolder(),  # noqa: B008  # it has no state
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._settings, self._environ, self._delivery = settings, environ, delivery
        self._servers = [RolloutServer(settings, url, wanted, delivery, environ) for url in settings.urls]
        self._vocab_size = wanted.model.vocab_size or 0
        self._writers: tuple[tuple[str, ...], ServiceClient] | None = None
        self._loop: BackgroundLoop | None = None
        self._pushed_once = False
        self._sender = uuid.uuid4().hex[:8]
        self._attempts = 0
        self.behind: dict[str, str] = {}
        """Servers that lack the weights that were pushed last, by URL, and why."""
        self.waits_for: str | None = None
        """What the rollouts wait for; None while nothing. Safe to read from any thread."""

    def submit_start(self, thoroughly: bool = True) -> Future[None]:
        """Connect to all servers and check that each can write this policy's rollouts, see `RolloutServer.start`.

        The future raises ServiceError where one cannot; the message says why and how to mend it.
        """
        self._loop = BackgroundLoop("sip-rollouts")
        return self._loop.submit(self._start(thoroughly))

    async def _start(self, thoroughly: bool) -> None:
        outcomes = await asyncio.gather(*(server.start(thoroughly) for server in self._servers), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
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

    def submit_upkeep(self, weights: Weights) -> Future[None] | None:
        """Send the weights again to servers that lost them, until this future is cancelled.

        None where it is not needed, since each leader does so for itself. Where only this one can, it must while any
        other may still write, also when its own rollouts are there.
        """
        return None if self._delivery.by_any_leader else self._running().submit(self._upkeep(weights))

    def submit_rollouts(
        self, asks: Sequence[Ask], sampling: Sampling, weights: Weights, hear: Hear = lambda _rows: None
    ) -> Future[list[Rows]]:
        """The continuations of each request, written with these weights, which were pushed, and no others.

        `hear` gets those of each request once, as soon as this is known of them.
        """
        return self._running().submit(self._rollouts(asks, sampling, weights, hear))

    def close(self) -> None:
        """Cancel what is under way and close all connections. A second call does nothing."""
        loop, self._loop = self._loop, None
        if loop is None:
            return
        try:
            loop.submit(self._close()).result(timeout=10)
        except TimeoutError:
            logger.warning("the connections to rollout servers did not close within 10 s; they end with the process")
        finally:
            loop.close()

    def _running(self) -> BackgroundLoop:
        if self._loop is None:
            raise RuntimeError("RolloutFleet.submit_start comes first")
        return self._loop

    async def _close(self) -> None:
        # First end the calls, then their connections: a call must not find its connections gone.
        await cancel_others()
        for server in self._servers:
            await server.close()
        if self._writers is not None:
            await self._writers[1].close()

    async def _push(self, weights: Weights) -> PushTimes:
        self.behind = {}
        try:
            while True:
                times = await self._send(weights, may_wait=self._pushed_once)
                if times is not None:
                    self._pushed_once = True
                    return times
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self.waits_for = None

    async def _send(self, weights: Weights, may_wait: bool) -> PushTimes | None:
        """Push to all servers at once; None where none took the weights, and some are only away.

        Raises:
            ServiceError: none of them took the weights, and waiting would not help (or may not be done).
        """
        checksums = FolderChecksums(weights.folder)
        self._attempts += 1
        attempt = f"{self._sender}.{self._attempts}"
        outcomes = await asyncio.gather(
            *(server.push(weights, checksums, attempt) for server in self._servers), return_exceptions=True
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
        if not may_wait or not any(error.passing for error in faults.values()):
            raise ServiceError(f"no server of --rollout-url can be used. {told}")
        self.waits_for = f"no server of --rollout-url takes the new weights ({told})"
        return None

    async def _rollouts(self, asks: Sequence[Ask], sampling: Sampling, weights: Weights, hear: Hear) -> list[Rows]:
        rows: dict[int, Rows] = {}
        at_work: dict[str, float] = {}
        losses: Counter[RolloutServer] = Counter()
        fruitless = 0
        try:
            while True:
                holders = await self._holders(weights.version, losses)
                if not holders:
                    # What was said by a push that failed tells more.
                    self.waits_for = self.waits_for or "no server of --rollout-url has the weights of this step"
                else:
                    self.waits_for = None
                    open_asks = {number: ask for number, ask in enumerate(asks) if number not in rows}
                    writers = await self._writers_of(holders, weights.version, losses)
                    done = await write(writers, open_asks, sampling, hear)
                    rows |= done.rows
                    if len(rows) == len(asks):
                        return [rows[number] for number in range(len(asks))]
                    fault, fruitless = done.fault, 0 if done.rows or done.lost else fruitless + 1
                    if fruitless == FRUITLESS_ROUNDS:
                        raise ServiceError(f"the servers of --rollout-url write no rollouts: {fault}")
                    self.waits_for = f"no server of --rollout-url writes rollouts ({fault})"
                await asyncio.sleep(PAUSE_SECONDS)
                if self._delivery.by_any_leader:
                    await self._restore(weights, at_work)
                else:
                    self._lose_patience(weights.version, await self._labels(), at_work)
        finally:
            self.waits_for = None

    async def _upkeep(self, weights: Weights) -> None:
        at_work: dict[str, float] = {}
        told = ""
        try:
            while True:
                await asyncio.sleep(PAUSE_SECONDS)
                fault = ""
                try:
                    if await self._restore(weights, at_work):
                        fault = "; ".join(f"{url}: {why}" for url, why in self.behind.items())
                except ServiceError as error:  # who writes gives up in the end
                    fault = str(error)
                # This rank's own rollouts may be there, and then nobody would hear what the others wait for.
                if fault and fault != told:
                    logger.warning("the weights were lost and could not be sent again: %s", fault)
                told = fault
        finally:
            self.waits_for = None

    def _lose_patience(self, version: str, labels: Mapping[RolloutServer, str | None], seen: dict[str, float]) -> None:
        """Give up on servers that answer, but do not get these weights from the leader who has them.

        Those that do not answer are waited for, and those that are given the weights just now. `seen` keeps since when
        each answers without them, and since when it is given them by the same attempt.

        Raises:
            ServiceError: all that answer do so for longer than a call may take.
        """
        there = {server.url: label for server, label in labels.items() if label is not None}
        if not there or any(is_proven(label, version) for label in there.values()):
            seen.clear()
            return
        now = time.monotonic()
        waited = [
            now - seen.setdefault(url if loaded_by(label, version) is None else label, now)
            for url, label in there.items()
        ]
        if min(waited) > self._settings.timeout:
            raise ServiceError(
                f"the servers of --rollout-url lost their weights ({', '.join(there)}), and the main rank could not "
                "send them again; its output says why"
            )

    async def _holders(self, version: str, losses: Mapping[RolloutServer, int]) -> dict[RolloutServer, str]:
        """The servers that hold these weights, with their labels; without those that lost them too often.

        Raises:
            ServiceError: all of them did.
        """
        labels = await self._labels()
        held = {server: label for server, label in labels.items() if label and is_proven(label, version)}
        steady = {server: label for server, label in held.items() if losses.get(server, 0) < LOSSES}
        if held and not steady:
            told = ", ".join(server.url for server in held)
            raise ServiceError(
                f"the servers of --rollout-url write no rollouts: {told} lost its weights while it wrote, "
                f"{LOSSES} times in one step; its log says whether it fell, and no other run may use it"
            )
        return steady

    async def _restore(self, weights: Weights, at_work: dict[str, float]) -> bool:
        """Send the weights again where no server holds them and no other leader is at it; whether it did.

        A leader that is done would not do it for the others; and of two that send at once, each would undo what the
        other has proven. `at_work` keeps since when labels of other senders were seen: one that stands for longer than
        a call may take was left behind.
        """
        labels = [label for label in (await self._labels()).values() if label is not None]
        if any(is_proven(label, weights.version) for label in labels):
            return False
        now, patience = time.monotonic(), self._settings.timeout
        foreign = [label for label in labels if loaded_by(label, weights.version) not in (None, self._sender)]
        if any(now - at_work.setdefault(label, now) < patience for label in foreign):
            return False
        await self._send(weights, may_wait=True)
        return True

    async def _labels(self, of: Sequence[RolloutServer] | None = None) -> dict[RolloutServer, str | None]:
        """What each server's weights are called; None of one that does not answer."""

        async def label(server: RolloutServer) -> str | None:
            try:
                return await server.label()
            except UnusableError:
                return None

        asked = self._servers if of is None else of
        return dict(zip(asked, await asyncio.gather(*map(label, asked)), strict=True))

    async def _writers_of(
        self, holders: Mapping[RolloutServer, str], version: str, losses: Counter[RolloutServer]
    ) -> Writers:
        """Exactly these servers behind one client, with their common queue, retries and failover.

        `losses` counts for each how often it did not hold the weights to the end.
        """
        urls = tuple(server.url for server in holders)
        if self._writers is None or self._writers[0] != urls:
            if self._writers is not None:
                await self._writers[1].close()
            # As many calls at each server, however many there are.
            concurrency = len(urls) * self._settings.concurrency
            settings = replace(self._settings, urls=urls, concurrency=concurrency)
            self._writers = urls, ServiceClient(settings, self._environ)
            await self._writers[1].open()

        async def hold_still() -> bool:
            labels = await self._labels(list(holders))
            gone = [server for server, label in holders.items() if labels[server] != label]
            losses.update(gone)
            return not gone

        return Writers(self._writers[1], next(iter(holders)).model, version, self._vocab_size, hold_still)

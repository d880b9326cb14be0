"""Rollouts on vLLM servers, which get the policy's weights before they write.

The ranks of the first data parallel replica export the weights to a folder; its leader lets every server load them and
prove that it has them. Then the leader of each replica asks for its own prefixes. While leaders wait, all ranks meet on
the control group as everywhere.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_sip.checkpoint.agree import from_main
from megatron_sip.checkpoint.hf import export_hf
from megatron_sip.config.groups import Config
from megatron_sip.errors import CheckpointError
from megatron_sip.model.build import first_layer
from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel.leader import Leader, StopRequestedError
from megatron_sip.parallel.world import World
from megatron_sip.rollout.delivery import ByConnection, ByFolder
from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.fleet import RolloutFleet
from megatron_sip.rollout.probe import policy_logprobs
from megatron_sip.rollout.proof import Probe, Weights
from megatron_sip.rollout.requests import Ask, plan_asks
from megatron_sip.rollout.server import Wanted
from megatron_sip.rollout.waves import Waves, packed_rows, unpacked
from megatron_sip.rollout.weights_folder import WeightsFolder
from megatron_sip.rollout.writing import Rows
from megatron_sip.services.settings import rollout_settings
from megatron_sip.types import TokenArray

T = TypeVar("T")

PROBE_TOKENS = 64
"""Of the first prefixes of the run; every push is proven on the same ones."""


class VllmEngine:
    """The ranks' side of the rollout servers. Made by all ranks together, after the policy.

    `at_boundary` is called before the weights are sent, and may raise to give the rollouts up.

    Raises:
        ConfigError: `--rollout-transfer nccl` on a CPU.
        ServiceError: a server cannot write this policy's rollouts.
        CheckpointError: `--rollout-weights-dir` cannot be written.
    """

    def __init__(
        self,
        policy: PolicyModel,
        config: Config,
        world: World,
        leader: Leader,
        at_boundary: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy, self.config, self.world, self.leader = policy, config, world, leader
        self.at_boundary = at_boundary
        transfer = config.rollout.rollout_transfer
        self._delivery = ByFolder() if transfer == "folder" else ByConnection(transfer, world.device)
        self._pushes = 0
        self._run = from_main(world, lambda: uuid.uuid4().hex[:12])
        self._probe_tokens: tuple[int, ...] = ()
        self._told: dict[str, str] = {}
        self._fleet: RolloutFleet | None = None
        self._folder: WeightsFolder | None = None
        try:
            with suppress(StopRequestedError):  # the loop over the steps hears of it before the first rollouts
                self._wait(leader.together(self._connect))
        except BaseException:
            self.close()
            raise

    def _connect(self) -> Future[None] | None:
        """On leaders, the look at all servers, which has begun."""
        world, rollout = self.world, self.config.rollout
        if not world.is_leader:
            return None
        wanted = Wanted(
            model=self.config.model,
            seq_length=self.config.data.seq_length,
            checksums=rollout.rollout_proof == "checksum",
            tolerance=rollout.rollout_tolerance,
            allow_public=rollout.allow_insecure_rollout,
        )
        if world.is_main:
            self._folder = WeightsFolder(rollout.rollout_weights_dir)
        self._fleet = RolloutFleet(rollout_settings(rollout), wanted, self._delivery)
        # They hash all of their weights for a thorough one, so one leader asks for it.
        return self._fleet.submit_start(thoroughly=world.is_main)

    def generate(
        self,
        prefixes: Sequence[TokenArray],
        sample_indices: Sequence[int],
        sampling: Sampling,
        on_wave: OnWave = lambda _first, _rollouts: None,
    ) -> Rollouts:
        """See `RolloutEngine.generate`.

        With a live server the same request need not give the same tokens: what it computes together depends on what
        arrives together.

        Raises:
            ServiceError: no server can be used, and waiting would not help; on all ranks alike.
            StopRequestedError: a rank was asked to stop.
        """
        self.at_boundary()
        began = time.perf_counter()
        weights, probe_seconds = self._push(prefixes)
        pushed = time.perf_counter()
        asks = plan_asks(prefixes, sample_indices, sampling)
        waves = Waves(asks, sampling, on_wave)
        with self._upkeep(weights):
            rows = self._wait(self._fleet.submit_rollouts(asks, sampling, weights, waves.hear) if self._fleet else None)
        wrote = time.perf_counter() - pushed
        rollouts = self._to_all(asks, rows, len(prefixes), sampling)
        if not self._fleet:
            on_wave(0, rollouts)
        metrics = {"time/rollout_write": (wrote, 1.0), "rollout/tokens_per_second": (written_tokens(rows), wrote)}
        if self.world.is_main:
            metrics["time/rollout_push"] = (pushed - began - probe_seconds, 1.0)
            metrics["time/rollout_probe"] = (probe_seconds, 1.0)
            metrics["rollout/servers_behind"] = (float(len(self._told)), 1.0)
        return replace(rollouts, metrics=metrics)

    def close(self) -> None:
        """End the connections and remove the weights that were sent, whichever of both fails."""
        with ExitStack() as closing:
            if self._folder:
                closing.callback(self._folder.close)
            if self._fleet:
                closing.callback(self._fleet.close)

    def _version(self) -> str:
        """The name of the weights that were pushed last; no other run has it."""
        return f"{self._run}-{self._pushes}"

    def _push(self, prefixes: Sequence[TokenArray]) -> tuple[Weights, float]:
        """Send the weights to all servers.

        Returns:
            What was sent; the seconds that its proof took, the policy's own part included.
        """
        self._pushes += 1
        # Together, because the export meets the ranks of one replica only.
        exported, own_seconds = self.leader.together(lambda: self._exported(prefixes))
        weights = from_main(self.world, lambda: exported)
        if weights is None:
            raise RuntimeError("the main rank is in the first replica")
        pushed = self._wait(self._fleet.submit_push(weights) if self._fleet and self.world.is_main else None)
        if self._folder:
            self._folder.only_last()
        self._tell_news()
        return weights, own_seconds + (pushed.proof if pushed else 0.0)

    def _exported(self, prefixes: Sequence[TokenArray]) -> tuple[Weights | None, float]:
        """The weights in a folder, on the main rank; the other ranks of its replica help."""
        world = self.world
        if world.dp_rank != 0:
            return None, 0.0
        began = time.perf_counter()
        longest = min(PROBE_TOKENS, self.config.data.seq_length - 1)
        self._probe_tokens = self._probe_tokens or probe_text(prefixes, longest)
        logprobs = policy_logprobs(self.policy, world, self._probe_tokens)
        seconds = time.perf_counter() - began
        folder = self._folder.next(self._version()) if self._folder else Path()
        self._export(folder)
        if not world.is_main:
            return None, seconds
        in_float32 = next(self.policy.parameters()).dtype == torch.float32
        return Weights(self._version(), folder, Probe(self._probe_tokens, logprobs), in_float32), seconds

    def _export(self, folder: Path) -> None:
        """Write the weights; the ranks of one replica together."""
        try:
            export_hf(
                folder,
                dict(self.policy.named_parameters()),
                self.config.model,
                group=self.world.model_parallel_group,
                tp_rank=self.world.tp_rank,
                first_layer=first_layer(self.policy),
                durable=False,
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"the weights for the rollout servers cannot be written ({error}); with --rollout-weights-dir name a "
                "folder that has room for them twice"
            ) from error

    def _wait(self, future: Future[T] | None) -> T | None:
        """The future's result where there is one; all ranks wait together, and leave nothing running on a stop."""
        try:
            return self.leader.wait(future, lambda: self._fleet.waits_for if self._fleet else None)
        except BaseException:
            if future is not None:
                future.cancel()
            raise

    @contextmanager
    def _upkeep(self, weights: Weights) -> Iterator[None]:
        """On the main rank, and where only it can: servers that lose the weights get them again meanwhile."""
        future = self._fleet.submit_upkeep(weights) if self._fleet and self.world.is_main else None
        try:
            yield
        finally:
            if future is not None and not future.cancel() and not future.cancelled():
                future.result()  # it ends by an error only

    def _tell_news(self) -> None:
        """On the main rank: which servers are left out from now on, and why; and which are used again."""
        if not (self._fleet and self.world.is_main):
            return
        behind = self._fleet.behind
        for url in behind.keys() - self._told.keys():
            print(f"> rollout server {url} is not used: {behind[url]}", flush=True)
        for url in self._told.keys() - behind.keys():
            print(f"> rollout server {url} is used again", flush=True)
        self._told = dict(behind)

    def _to_all(self, asks: Sequence[Ask], rows: list[Rows] | None, prefixes: int, sampling: Sampling) -> Rollouts:
        """The leader's rows on all ranks of its group, as one tensor: a row's tokens and, last, its length."""
        packed = packed_rows(asks, rows or [[] for _ in asks], 0, prefixes, sampling)
        world = self.world
        if world.tp_size * world.pp_size > 1:
            packed = packed.to(world.device)
            dist.broadcast(packed, src=world.leader_rank, group=world.model_parallel_group)
            packed = packed.cpu()
        return unpacked(packed)


def probe_text(prefixes: Sequence[TokenArray], longest: int) -> tuple[int, ...]:
    """`longest` tokens for the probe: those of the prefixes, over and over where there are fewer."""
    return tuple(np.resize(np.concatenate(prefixes), longest).tolist())


def written_tokens(rows: Sequence[Rows] | None) -> float:
    """How many tokens the servers wrote for this leader."""
    return float(sum(len(row) for own in rows or [] for row in own))

"""One vLLM server that writes rollouts: whether it can, its weights, and the proof that it has them.

The routes are those of vLLM 0.32 in development mode (VLLM_SERVER_DEV_MODE=1).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError, ServiceError
from megatron_sip.rollout.address import require_private
from megatron_sip.rollout.proof import (
    FLOAT32_TOLERANCE,
    TOLERANCE,
    FolderChecksums,
    Probe,
    Weights,
    probe_fault,
    stale_fault,
)
from megatron_sip.rollout.requests import probe_body, probe_logprobs
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.types import Missing, MissingReason

CACHE_RESETS = 5
"""A reset of the prefix cache fails while a request still holds blocks of it, which passes."""
RESET_PAUSE_SECONDS = 0.5
_HOW_TO_START = "start it with VLLM_SERVER_DEV_MODE=1 (tools/serve_vllm.py --rollouts)"


class UnusableError(Exception):
    """Why a server cannot be used now. `passing`: it may be well again by itself."""

    def __init__(self, text: str, passing: bool = False) -> None:
        super().__init__(text)
        self.passing = passing


@dataclass(frozen=True)
class Wanted:
    """What a rollout server must be: the policy's architecture, tokens of prefix plus suffix, and how it is proven."""

    model: ModelConfig
    seq_length: int
    checksums: bool
    tolerance: float | None
    allow_public: bool


@dataclass(frozen=True)
class PushTimes:
    """Seconds of one push: until the weights were loaded and the cache was empty, and of the proof."""

    load: float
    proof: float


class RolloutServer:
    """One server. Construct anywhere; use inside one running event loop."""

    def __init__(self, settings: ClientSettings, url: str, wanted: Wanted, environ: Mapping[str, str] | None) -> None:
        self.url = url
        self.client = ServiceClient(replace(settings, urls=(url,)), environ)
        self._wanted = wanted
        self._model = settings.model or ""
        self._before: tuple[Probe, tuple[float, ...]] | None = None

    @property
    def model(self) -> str:
        """The name of the served model, after `start`."""
        return self._model

    async def start(self) -> None:
        """Find out whether the server can write this policy's rollouts.

        Raises:
            ServiceError: it cannot, and why.
        """
        if not self._wanted.allow_public:
            await asyncio.to_thread(require_private, self.url)
        await self.client.open()
        info = await self.client.check()
        self._model = info.model
        if info.max_model_len is not None and info.max_model_len < self._wanted.seq_length:
            raise ServiceError(
                f"{self.url} takes {info.max_model_len} tokens, fewer than the {self._wanted.seq_length} of "
                f"--seq-length; start it with --max-model-len {self._wanted.seq_length} or more"
            )
        try:
            await self._version()
            self._require_same_model(await self._answer(self.client.get("/server_info?config_format=json", True)))
        except UnusableError as error:
            raise ServiceError(f"{self.url}: {error}") from error

    def _require_same_model(self, info: Mapping[str, Any]) -> None:
        """Refuse a server of another architecture, before a reload leaves it with half of the weights."""
        mine = self._wanted.model
        theirs = served_sizes(info)
        wrong = [
            f"{name} {theirs[name]}, the policy has {value}"
            for name, value in policy_sizes(mine).items()
            if name in theirs and theirs[name] != value
        ]
        if wrong:
            raise ServiceError(
                f"{self.url} serves another model than the policy: {'; '.join(wrong)}; start it on a folder with the "
                "policy's config.json, such as that of --load"
            )

    async def push(self, weights: Weights, checksums: FolderChecksums) -> PushTimes:
        """Let the server load the weights, prove it, and give them their name there.

        Raises:
            UnusableError: it does not have them; nothing that it writes may be used.
        """
        began = time.monotonic()
        await self._reload(weights)
        await self._empty_cache()
        loaded = time.monotonic()
        await self._prove(weights, checksums)
        await self._answer(self.client.post("/update_weight_version", {"new_version": weights.version}, at_root=True))
        return PushTimes(loaded - began, time.monotonic() - loaded)

    async def has(self, version: str) -> bool:
        """Whether the weights of this name were proven there and are there still: a server that was restarted, or
        got those of another run, has another name.

        Raises:
            UnusableError: it does not answer.
        """
        return await self._version() == version

    async def _version(self) -> str:
        answer = await self._answer(self.client.get("/weight_info", at_root=True))
        return str(answer.get("weight_version"))

    async def _reload(self, weights: Weights) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}
        answer = await self.client.post("/collective_rpc", body, at_root=True)
        if isinstance(answer, Missing):
            if _is_away(answer):
                raise UnusableError(f"the weights could not be sent ({answer.detail})", passing=True)
            raise UnusableError(
                f"it could not load the weights in {weights.folder} ({answer.detail}); it must see that folder under "
                "the same path (--rollout-weights-dir), see its log for the reason, and start it anew: a reload that "
                "failed leaves it without whole weights"
            )

    async def _empty_cache(self) -> None:
        """Drop keys and values of the old weights; a reload does not."""
        for attempt in range(CACHE_RESETS):
            if attempt:
                await asyncio.sleep(RESET_PAUSE_SECONDS)
            answer = await self._answer(self.client.post("/reset_prefix_cache", {}, at_root=True))
            if answer.get("success") is True:
                return
        raise UnusableError("its prefix cache could not be emptied, since requests of somebody hold it", passing=True)

    async def _prove(self, weights: Weights, checksums: FolderChecksums) -> None:
        dtypes = await self._compare(checksums) if self._wanted.checksums else frozenset()
        probe, text = weights.probe, probe_body(weights.probe.tokens, self._model)
        served = probe_logprobs(await self._answer(self.client.post("/completions", text)), probe.tokens)
        if isinstance(served, str):
            raise UnusableError(f"the answer to the probe is of no use: {served}")
        exact = weights.in_float32 and dtypes == {torch.float32}
        tolerance = self._wanted.tolerance or (FLOAT32_TOLERANCE if exact else TOLERANCE)
        fault = probe_fault(probe, served, tolerance)
        if fault is None and self._before is not None and stale_fault(*self._before, probe, served):
            fault = "it gives the very log-probabilities of before, though the policy has moved"
        if fault is not None:
            raise UnusableError(f"it has not the new weights: {fault}")
        self._before = probe, served

    async def _compare(self, checksums: FolderChecksums) -> frozenset[torch.dtype]:
        answer = await self._answer(self.client.post("/weight_checker", {"action": "checksum"}, at_root=True))
        shown = answer.get("checksums")
        if not isinstance(shown, dict):
            raise UnusableError("it shows no checksums of its weights; say --rollout-proof logprobs")
        try:
            seen = await asyncio.to_thread(checksums.compare, shown)
        except CheckpointError as error:
            raise UnusableError(f"the weights that were sent cannot be read again: {error}") from error
        if seen.other:
            raise UnusableError(
                f"it has not the new weights: {len(seen.other)} of {seen.same + len(seen.other)} compared tensors are "
                f"others, such as {seen.other[0]}"
            )
        if not seen.same:
            raise UnusableError("its checksums name no tensor of the policy; say --rollout-proof logprobs")
        return seen.dtypes

    async def _answer(self, call: Any) -> dict[str, Any]:
        """What a route answers.

        Raises:
            UnusableError: the call failed; how to mend it where the route is not there.
        """
        answer: dict[str, Any] | Missing = await call
        if not isinstance(answer, Missing):
            return answer
        if answer.reason is MissingReason.HTTP_STATUS and answer.detail.startswith("404"):
            raise UnusableError(f"it has no development endpoints ({answer.detail}); {_HOW_TO_START}")
        raise UnusableError(f"it does not answer as it should ({answer.detail})", passing=_is_away(answer))


def _is_away(missing: Missing) -> bool:
    return missing.reason in (MissingReason.CONNECTION, MissingReason.TIMEOUT) or missing.detail.startswith("503")


def policy_sizes(model: ModelConfig) -> dict[str, int | None]:
    """The sizes that a server must have, by their names in a Hugging Face config.json."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "vocab_size": model.vocab_size,
    }


def served_sizes(info: Mapping[str, Any]) -> dict[str, Any]:
    """What vLLM's /server_info tells of the model, by the names of config.json; empty where it tells nothing."""
    found: Any = info
    for key in ("vllm_config", "model_config", "hf_config"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}

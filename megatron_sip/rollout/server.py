"""One vLLM server that writes rollouts: whether it can, its weights, and the proof that it has them.

The routes are those of vLLM 0.32 in development mode (VLLM_SERVER_DEV_MODE=1).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_sip.checkpoint.hf_config import model_config_from_hf, model_differences
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError, ServiceError
from megatron_sip.rollout.address import require_private
from megatron_sip.rollout.calls import Reach, UnusableError, answered
from megatron_sip.rollout.delivery import Delivery
from megatron_sip.rollout.label import failed_label, loading_label, proven_label
from megatron_sip.rollout.proof import (
    FLOAT32_TOLERANCE,
    TOLERANCE,
    FolderChecksums,
    Probe,
    Weights,
    probe_fault,
    stale_fault,
    tensor_name,
)
from megatron_sip.rollout.requests import probe_body, probe_logprobs
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.types import Missing

CACHE_RESETS = 5
"""A reset of the prefix cache fails while a request still holds blocks of it, which passes."""
RESET_PAUSE_SECONDS = 0.5
NAMING_SECONDS = 5.0
"""The last word of a push goes out once and soon: no server starts anew so fast that it could take it for another."""


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

    def __init__(
        self,
        settings: ClientSettings,
        url: str,
        wanted: Wanted,
        delivery: Delivery,
        environ: Mapping[str, str] | None,
    ) -> None:
        self.url = url
        own = replace(settings, urls=(url,))
        self.client = ServiceClient(own, environ)
        self._single = ServiceClient(replace(own, retries=0), environ)
        self._once = ServiceClient(replace(own, retries=0, timeout=min(own.timeout, NAMING_SECONDS)), environ)
        self._wanted, self._delivery = wanted, delivery
        self._reach = Reach(url, self.client, self._single)
        self._model = settings.model or ""
        self._before: tuple[Probe, tuple[float, ...]] | None = None

    @property
    def model(self) -> str:
        """The name of the served model, after `start`."""
        return self._model

    async def start(self, thoroughly: bool = True) -> None:
        """Find out whether the server can write this policy's rollouts.

        thoroughly  compare its model with the policy's, for which it hashes all of its weights: enough for one leader

        Raises:
            ServiceError: it cannot, and why.
        """
        if not self._wanted.allow_public:
            await asyncio.to_thread(require_private, self.url)
        for client in (self.client, self._single, self._once):
            await client.open()
        info = await self.client.check()
        self._model = info.model
        if info.max_model_len is not None and info.max_model_len < self._wanted.seq_length:
            raise ServiceError(
                f"{self.url} takes {info.max_model_len} tokens, fewer than the {self._wanted.seq_length} of "
                f"--seq-length; start it with --max-model-len {self._wanted.seq_length} or more"
            )
        try:
            await self.label()
            await self._delivery.check(self._reach)
            if thoroughly:
                await self._require_same_model(info.root)
        except UnusableError as error:
            raise ServiceError(f"{self.url}: {error}") from error

    async def _require_same_model(self, root: str | None) -> None:
        """Refuse a server of another architecture, which a reload would leave with half of the weights.

        By its own config.json where that can be seen from here; by the names of its tensors; by its vocabulary.
        """
        wrong = differing_config(root, self._wanted.model)
        if not wrong and self._wanted.checksums:
            names = {tensor_name(place) for place in await self._checksums()}
            odd = sorted(names ^ served_names(self._wanted.model))
            wrong = [f"{odd[0]} is in one of the two only"] if odd else []
        if not wrong:
            wrong = await self._vocabulary_fault()
        if wrong:
            raise ServiceError(
                f"{self.url} serves another model than the policy: {'; '.join(wrong)}; start it on a folder with the "
                "policy's config.json, such as that of --load"
            )

    async def _vocabulary_fault(self) -> list[str]:
        """What is wrong with the server's vocabulary; it names its size where a request speaks of an id beyond."""
        size = self._wanted.model.vocab_size
        body = {"model": self._model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(size): 0.0}}
        answer = await self.client.post("/completions", body)
        if not isinstance(answer, Missing):
            return [f"its vocabulary is larger than the policy's {size}"]
        told = re.search(r"Vocabulary size: (\d+)", answer.detail)
        if told is None:
            raise UnusableError(f"it does not tell its vocabulary ({answer.detail}); it must be vLLM")
        return [] if int(told[1]) == size else [f"its vocabulary has {told[1]} tokens, the policy's {size}"]

    async def close(self) -> None:
        """Close all connections."""
        for client in (self.client, self._single, self._once):
            await client.close()

    async def push(self, weights: Weights, checksums: FolderChecksums, attempt: str) -> PushTimes:
        """Let the server load the weights, prove it, and give them their label there.

        Its old label is taken away first: a reload that fails in the middle leaves weights that are nobody's. The
        label of the attempt is looked at again behind the proof, so that a server which was started anew meanwhile, or
        was sent others, does not get a name for what it no longer has.

        Raises:
            UnusableError: it does not have them; nothing that it writes may be used.
        """
        began = time.monotonic()
        loading = loading_label(weights.version, attempt)
        await self._set_label(self.client, loading)
        try:
            await self._delivery.bring(self._reach, weights)
            await self._empty_cache()
            loaded = time.monotonic()
            await self._prove(weights, checksums)
            if await self.label() != loading:
                raise UnusableError("it was started anew, or sent other weights, while it was proven", passing=True)
            await self._set_label(self._once, proven_label(weights.version, attempt))
        except UnusableError:
            await self._give_up(loading, failed_label(weights.version, attempt))
            raise
        return PushTimes(loaded - began, time.monotonic() - loaded)

    async def _give_up(self, loading: str, failed: str) -> None:
        """Tell other leaders, if the server hears it, that nobody is at it any more."""
        with suppress(UnusableError):  # the push failed for a reason of its own, which is told
            if await self.label() == loading:
                await self._set_label(self._once, failed)

    async def label(self) -> str:
        """What its weights are called, see `label.py`; something else where nobody called them anything.

        Raises:
            UnusableError: it does not answer.
        """
        answer = await answered(self.client.get("/weight_info", at_root=True))
        return str(answer.get("weight_version"))

    async def _set_label(self, client: ServiceClient, label: str) -> None:
        await answered(client.post("/update_weight_version", {"new_version": label}, at_root=True))

    async def _empty_cache(self) -> None:
        """Drop keys and values of the old weights, those in a store beside the server too; a reload does not."""
        for attempt in range(CACHE_RESETS):
            if attempt:
                await asyncio.sleep(RESET_PAUSE_SECONDS)
            answer = await answered(self.client.post("/reset_prefix_cache?reset_external=true", {}, at_root=True))
            if answer.get("success") is True:
                return
        raise UnusableError("its prefix cache could not be emptied, since requests of somebody hold it", passing=True)

    async def _prove(self, weights: Weights, checksums: FolderChecksums) -> None:
        dtypes = await self._compare(checksums) if self._wanted.checksums else frozenset()
        probe, text = weights.probe, probe_body(weights.probe.tokens, self._model, weights.version)
        answer = await answered(self.client.post("/completions", text), development=False)
        served = probe_logprobs(answer, probe.tokens)
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
        shown = await self._checksums()
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

    async def _checksums(self) -> dict[str, str]:
        """The checksum of each of the server's tensors, by the place and name that vLLM gives it."""
        answer = await answered(self.client.post("/weight_checker", {"action": "checksum"}, at_root=True))
        shown = answer.get("checksums")
        if not isinstance(shown, dict):
            raise UnusableError("it shows no checksums of its weights; say --rollout-proof logprobs")
        return {str(place): str(digest) for place, digest in shown.items()}


def differing_config(root: str | None, model: ModelConfig) -> list[str]:
    """Where the config.json of the server's own folder contradicts the policy; nothing where it cannot be seen here."""
    if root is None or not (Path(root) / "config.json").is_file():
        return []
    try:
        return model_differences(model_config_from_hf(root), model, f"{root}/config.json")
    except CheckpointError as error:
        return [str(error)]


def served_names(model: ModelConfig) -> frozenset[str]:
    """The names of a Llama's tensors in vLLM, which fuses q, k, v and gate, up."""
    inner = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    parts = (*inner, "input_layernorm", "post_attention_layernorm")
    names = {f"model.layers.{layer}.{part}.weight" for layer in range(model.num_layers or 0) for part in parts}
    head = {"lm_head.weight"} if model.untie_embeddings_and_output_weights else set()
    return frozenset({"model.embed_tokens.weight", "model.norm.weight", *names, *head})

"""A stand-in for a vLLM rollout server: a real Llama in transformers behind vLLM's routes, with faults on demand.

It keeps weights as vLLM's CPU build does: norms and embeddings as they were loaded (rows padded to 64), and linear
layers in a form that shows no checksum. Its sampler is its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from aiohttp import web
from fake_server import FakeServer, respond, status
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_sip.rollout.receiver import WeightReceiver

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make_llama(folder: Path, vocab_size: int = 331, seed: int = 7, spread: float = 0.3, **sizes: Any) -> Path:
    """A random Llama of the tiny run's sizes, wide enough that its likeliest token is clearly so."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=128,
        initializer_range=spread,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        **{**SIZES, **sizes},
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logprobs_of(model: LlamaForCausalLM, tokens: list[int]) -> list[float]:
    """`log p(token)` of all tokens but the first."""
    with torch.no_grad():
        table = torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)
    return table[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).tolist()


class Worker(WeightReceiver):
    """One rank of a server, which takes weights by the receiver that runs in vLLM."""

    def __init__(
        self, rank: int, size: int, falls_at: str | None = None, goes_on: threading.Event | None = None
    ) -> None:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=size, world_size_across_dp=size)
        self.vllm_config, self.rank = SimpleNamespace(parallel_config=parallel), rank
        self.device = torch.device("cpu")
        self.falls_at, self.goes_on = falls_at, goes_on
        self.tensors: dict[str, torch.Tensor] = {}

    def reload_weights(self, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights_iterator:
            if name == self.falls_at and self.goes_on is None:
                raise RuntimeError(f"no room for {name}")
            if name == self.falls_at:
                self.goes_on.wait(20)
            self.tensors[name] = tensor


class FakeRolloutServer(FakeServer):
    """A server whose own folder is `folder`, where `restart` goes back to, and which it tells with `root`.

    `ignores_reloads` answers well and keeps its weights; `forgets_some` loads all but the embedding; the next reloads
    answer the statuses of `breaks_reloads`, and load as little. `twist` is done to every continuation, for which
    `pause` may wait by its prompt, and which comes with `text`. `reloads` are the folders it was told to load,
    `checksums` the embedding's after each. Weights that come over a connection, `receptions` times, go to all of its
    `ranks`, which must get the same; 0 has no receiver. Loading fails when the tensor `falls_at` has come, or stands
    still until `goes_on`; `faults` are what the ranks said of it. `on_route` is called by the path of a request before
    its answer, `queries` are paths with their queries.
    """

    def __init__(self, folder: Path, *, development: bool = True, root: bool = False, **options: Any) -> None:
        super().__init__(models=("policy",), **{"max_model_len": 128, **options})
        self.folder = folder
        if root:
            entry = {"id": "policy", "object": "model", "max_model_len": self.max_model_len, "root": str(folder)}
            self.models_handler = respond({"object": "list", "data": [entry]})
        self.development = development
        self.ignores_reloads = self.forgets_some = False
        self.ranks, self.receptions = 1, 0
        self.falls_at: str | None = None
        self.goes_on: threading.Event | None = None
        self.faults: list[str] = []
        self.breaks_reloads: list[int] = []
        self.cache_resets = 0
        self.cache_is_held = 0
        self.twist: Callable[[list[int]], list[int]] = lambda tokens: tokens
        self.text = ""
        self.pause: Callable[[list[int]], Awaitable[None]] | None = None
        self.after_completion: Callable[[], None] = lambda: None
        self.on_route: dict[str, Callable[[], None]] = {}
        self.queries: list[str] = []
        self.reloads: list[Path] = []
        self.checksums: list[str] = []
        self.restart()

    def restart(self) -> None:
        """The weights of the folder, under no name."""
        self.model = LlamaForCausalLM.from_pretrained(self.folder, local_files_only=True)
        self.version = "default"

    def add_routes(self, app: web.Application) -> None:
        if self.development:
            app.router.add_get("/weight_info", self._weight_info)
            app.router.add_post("/collective_rpc", self._scripted(self._call_ranks))
            app.router.add_post("/reset_prefix_cache", self._scripted(self._reset))
            app.router.add_post("/weight_checker", self._scripted(self._check))
            app.router.add_post("/update_weight_version", self._scripted(self._name))

    def _before(self, request: web.Request) -> None:
        self.queries.append(request.path_qs)
        self.on_route.get(request.path, lambda: None)()

    async def _weight_info(self, request: web.Request) -> web.StreamResponse:
        self._before(request)
        return web.json_response({"weight_version": self.version})

    async def _call_ranks(self, request: web.Request) -> web.StreamResponse:
        self._before(request)
        body = await request.json()
        if body["method"] == "reload_weights":
            path = Path(body["kwargs"]["weights_path"])
            self.reloads.append(path)
            return await self._load(request, load_file(path / "model.safetensors"), [None])
        if self.ranks == 0:
            return web.json_response({"error": {"message": "no attribute", "code": 500}}, status=500)
        workers = [Worker(rank, self.ranks, self.falls_at, self.goes_on) for rank in range(self.ranks)]
        if body["method"] == "weight_receiver":
            return web.json_response({"results": [worker.weight_receiver() for worker in workers]})
        assert body["method"] == "receive_policy_weights"
        self.receptions += 1
        calls = [asyncio.to_thread(worker.receive_policy_weights, **body["kwargs"]) for worker in workers]
        told = await asyncio.gather(*calls)
        self.faults += [one["fault"] for one in told if one["fault"] is not None]
        if len(self.faults) == 0:
            for worker in workers[1:]:
                assert all(torch.equal(tensor, workers[0].tensors[name]) for name, tensor in worker.tensors.items())
        return await self._load(request, self.model.state_dict() | workers[0].tensors, told)

    async def _load(
        self, request: web.Request, tensors: dict[str, torch.Tensor], results: list[Any]
    ) -> web.StreamResponse:
        if not self.ignores_reloads:
            half = self.forgets_some or bool(self.breaks_reloads)
            if half:
                del tensors["model.embed_tokens.weight"]
            self.model.load_state_dict(tensors, strict=not half)
        if self.breaks_reloads:
            return await status(self.breaks_reloads.pop(0))(request)
        self.checksums.append(self._shown()["dp0:pp0:pcp0:tp0:model.embed_tokens.weight"])
        return web.json_response({"results": results})

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        self._before(request)
        self.cache_resets += 1
        self.cache_is_held -= 1
        return web.json_response({"success": self.cache_is_held < 0})

    async def _check(self, request: web.Request) -> web.StreamResponse:
        assert (await request.json()) == {"action": "checksum"}
        return web.json_response({"checksums": self._shown()})

    def _shown(self) -> dict[str, str]:
        shown = {}
        for name, tensor in self.model.state_dict().items():
            part = tensor.new_empty(0)
            if name.endswith("norm.weight"):
                part = tensor
            elif name in ("model.embed_tokens.weight", "lm_head.weight"):
                part = torch.cat([tensor, tensor.new_zeros(-len(tensor) % 64, tensor.shape[1])])
            fused = re.sub(r"[qkv]_proj", "qkv_proj", re.sub(r"(gate|up)_proj", "gate_up_proj", name))
            shown[f"dp0:pp0:pcp0:tp0:{fused}"] = hashlib.sha256(part.numpy().tobytes()).hexdigest()
        return shown

    async def _name(self, request: web.Request) -> web.StreamResponse:
        self._before(request)
        self.version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": self.version})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self._before(request)
        body = await request.json()
        prompt = body["prompt"]
        vocab_size = self.model.config.vocab_size
        if any(int(token) >= vocab_size for token in body.get("logit_bias", {})):
            told = f"out-of-vocab token ids. Vocabulary size: {vocab_size}"
            return web.json_response({"error": {"message": told, "code": 400}}, status=400)
        if set("@/\\\0") & set(body.get("cache_salt", "salt")):
            return await status(400)(request)  # as vLLM does
        if "prompt_logprobs" in body:
            rows: list[Any] = [None]
            rows += [
                {str(token): {"logprob": value, "rank": 1}}
                for token, value in zip(prompt[1:], logprobs_of(self.model, prompt), strict=True)
            ]
            return web.json_response({"choices": [{"index": 0, "text": "", "prompt_logprobs": rows}]})
        if self.pause is not None:
            await self.pause(prompt)
        choices = []
        for index in range(body.get("n", 1)):
            tokens = self.twist(written_by(self.model, prompt, body, body.get("seed", 0) + index))
            finish = "length" if len(tokens) == body["max_tokens"] else "stop"
            choice = {"index": index, "text": self.text, "token_ids": tokens, "prompt_token_ids": prompt}
            choices.append({**choice, "finish_reason": finish})
        self.after_completion()
        return web.json_response({"choices": choices[::-1]})  # their order is nobody's promise


def written_by(model: LlamaForCausalLM, prompt: list[int], body: dict[str, Any], seed: int) -> list[int]:
    """The continuation that the server writes by this model."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    while len(tokens) < body["max_tokens"]:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1].float()
        for token, bias in body.get("logit_bias", {}).items():
            logits[int(token)] += bias
        if body.get("temperature", 1.0) == 0:
            tokens.append(int(logits.argmax()))
        else:
            chances = torch.softmax(logits / body.get("temperature", 1.0), dim=-1)
            tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        if tokens[-1] in body.get("stop_token_ids", []):
            break
    return tokens


def changed(folder: Path, target: Path, by: float) -> Path:
    """A folder with the weights of another one, each moved a little."""
    shutil.copytree(folder, target)
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    torch.manual_seed(int(1e6 * math.log1p(by)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    model.save_pretrained(target)
    return target

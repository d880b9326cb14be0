"""A converted Llama in the real vLLM: the log-probabilities that it gives are those of transformers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from served import served
from tiny_corpus import documents, make_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_sip.checkpoint.hf import Conversion, convert

pytestmark = [pytest.mark.server, pytest.mark.nightly]  # a server of its own takes half a minute to start

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama, and what came back from a checkpoint that pads its three query groups and its vocabulary."""
    root = tmp_path_factory.mktemp("served")
    make_tokenizer(root / "hf", documents(60, 8, 1))
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=331,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        rope_parameters=LLAMA3_ROPE,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(root / "hf")
    convert(Conversion("hf", "mcore", root / "hf", root / "mcore", tensor_parallel=2, pipeline_parallel=2))
    convert(Conversion("mcore", "hf", root / "mcore", root / "served", max_shard_bytes=200_000))
    assert len(list((root / "served").glob("model-*.safetensors"))) > 2
    return root / "hf", root / "served"


@pytest.fixture(scope="module")
def url(folders: tuple[Path, Path]) -> Iterator[str]:
    """Base URL (with /v1) of a server of the converted model in float32."""
    log = folders[1].with_name("server.log")
    with served(folders[1], log, "--dtype", "float32", "--max-model-len", "128", "--threads", "1") as found:
        yield found


def ask(url: str, request: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/completions", json.dumps(request).encode(), headers)
    with urllib.request.urlopen(call, timeout=120) as answer:
        return json.load(answer)


def test_the_served_model_is_the_one_that_was_converted(folders: tuple[Path, Path], url: str) -> None:
    original, converted = folders
    text = documents(1, 6, 9)[0]
    ids = AutoTokenizer.from_pretrained(converted, local_files_only=True)(text).input_ids[:100]
    answer = ask(url, {"model": "served", "prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0})
    said = answer["choices"][0]["prompt_logprobs"]
    got = torch.tensor([said[place][str(token)]["logprob"] for place, token in enumerate(ids) if place > 0])
    model = LlamaForCausalLM.from_pretrained(original, dtype=torch.float64, local_files_only=True)
    with torch.no_grad():
        wanted = F.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    wanted = wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    worst = float((got - wanted).abs().max())
    print(f"log-probabilities of {len(got)} tokens within {worst:.1e}, spread {float(wanted.std()):.1f}")
    assert worst < 1e-4

"""The proof that a server has the weights of a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from fake_rollouts import make_llama
from safetensors.torch import load_file

from megatron_sip.rollout.proof import (
    FolderChecksums,
    Probe,
    checksum,
    probe_fault,
    served_part,
    stale_fault,
    tensor_name,
)

EMBEDDING, NORM, LINEAR = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.self_attn.qkv_proj.weight",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("proof") / "hf", num_hidden_layers=1)


def shown(folder: Path, tp_size: int, dtype: torch.dtype) -> dict[str, str]:
    """What a server of so many ranks would show: each keeps the norm, and its rows of 384 of the embedding."""
    tensors = load_file(folder / "model.safetensors")
    rows = torch.cat([tensors[EMBEDDING], torch.zeros(384 - 331, 32)]).to(dtype)
    found = {}
    for rank in range(tp_size):
        per_rank = 384 // tp_size
        part = rows[rank * per_rank : (rank + 1) * per_rank].contiguous()
        for name, tensor in ((EMBEDDING, part), (NORM, tensors[NORM].to(dtype))):
            raw = bytes(tensor.view(torch.uint8).flatten().tolist())
            found[f"dp0:pp0:pcp0:tp{rank}:{name}"] = hashlib.sha256(raw).hexdigest()
        found[f"dp0:pp0:pcp0:tp{rank}:{LINEAR}"] = hashlib.sha256(b"fused as the server likes it").hexdigest()
    return found


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_in_any_type_and_cut(folder: Path, tp_size: int, dtype: torch.dtype) -> None:
    seen = FolderChecksums(folder).compare(shown(folder, tp_size, dtype))
    assert (seen.same, seen.other, seen.dtypes) == (2 * tp_size, (), {dtype})


def test_one_odd_tensor_of_one_rank_is_named(folder: Path) -> None:
    found = shown(folder, 2, torch.bfloat16)
    found[f"dp0:pp0:pcp0:tp1:{EMBEDDING}"] = found[f"dp0:pp0:pcp0:tp0:{EMBEDDING}"]
    seen = FolderChecksums(folder).compare(found)
    assert (seen.same, seen.other) == (3, (EMBEDDING,))


def test_a_tensor_without_bytes_proves_nothing(folder: Path) -> None:
    """As a CPU server shows what it has repacked."""
    seen = FolderChecksums(folder).compare({f"dp0:pp0:pcp0:tp0:{EMBEDDING}": hashlib.sha256().hexdigest()})
    assert (seen.same, seen.other) == (0, ())
    assert FolderChecksums(folder).compare({"something": "else"}).same == 0


def test_one_bit_changes_a_checksum() -> None:
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3)
    other = tensor.clone()
    other.view(torch.int32)[1, 2] ^= 1
    assert checksum(tensor, torch.float32) != checksum(other, torch.float32)
    assert checksum(tensor, torch.bfloat16) == checksum(other, torch.bfloat16), "in this type they are the same weights"
    assert served_part(tensor, 1, 2).tolist() == [[0.0] * 3] * 32


def test_names_without_their_rank() -> None:
    assert tensor_name("dp1:pp0:pcp0:tp3:lm_head.weight") == "lm_head.weight"
    assert tensor_name("lm_head.weight") == "lm_head.weight"


def test_log_probabilities_within_the_tolerance() -> None:
    probe = Probe((1, 2, 3), (-1.0, -2.0))
    assert probe_fault(probe, (-1.1, -1.9), 0.11) is None
    for served in ((-1.1, -1.7), (float("nan"), -2.0), (float("-inf"), -2.0)):
        told = probe_fault(probe, served, 0.11)
        assert told is not None
        assert "--rollout-tolerance" in told


def test_a_server_that_stands_still_while_the_policy_moves() -> None:
    before, served = Probe((1, 2, 3), (-1.0, -2.0)), (-1.01, -2.01)
    moved = Probe((1, 2, 3), (-1.0, -2.1))
    assert stale_fault(before, served, moved, served)
    assert not stale_fault(before, served, moved, (-1.01, -2.0100001)), "it has moved, how far is for the tolerance"
    assert not stale_fault(before, served, Probe((1, 2, 3), (-1.0, -2.00001)), served), "the policy stands still too"
    assert not stale_fault(before, served, Probe((1, 2, 4), (-1.0, -2.1)), served), "another text"
    assert not stale_fault(None, (), moved, served)

"""Attention kernels on a CUDA device against float64: rows of a shared prefix, and prefixes of rollouts."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.model.attention import scored_attention, shared_prefix_attention
from megatron_sip.rollout.cache import DecodeCache, PrefillCache, StaticDecodeCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYOUT = torch.tensor([[40, 9, 7], [40, 9, 7], [17, 1, 5], [24, 8, 0]])
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
WIDTHS = pytest.mark.parametrize("dim", [64, 12], ids=["fused", "odd"])


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values of this format on the device."""
    return torch.randn(*shape, device="cuda", dtype=dtype)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


@DTYPES
@WIDTHS
def test_shared_prefix_attention_and_its_gradients(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    inputs = [drawn(57, len(LAYOUT), heads, dim, dtype=dtype) for heads in (8, 2, 2)]
    for attend in (shared_prefix_attention, scored_attention):
        own, exact = [
            [tensor.to(place, kind, copy=True).requires_grad_() for tensor in inputs]
            for kind, place in ((dtype, "cuda"), (torch.float64, "cpu"))
        ]
        found, wanted = attend(*own, LAYOUT, 0.3), attend(*exact, LAYOUT, 0.3)
        assert distance(found.cpu(), wanted) < LIMITS[dtype]
        weights = torch.randn(found.shape, dtype=torch.float64)
        found.backward(weights.to(found))
        wanted.backward(weights)
        for one, other in zip(own, exact, strict=True):
            assert distance(one.grad.cpu(), other.grad) < LIMITS[dtype]


@DTYPES
@WIDTHS
@pytest.mark.parametrize("lengths", [(33, 33, 33), (33, 5, 20)], ids=["equal", "unequal"])
@pytest.mark.parametrize("kind", [DecodeCache, StaticDecodeCache])
def test_rows_attend_to_prefix_and_suffix(
    dtype: torch.dtype, dim: int, lengths: tuple[int, ...], kind: type[DecodeCache]
) -> None:
    torch.manual_seed(0)
    layout = torch.tensor([[length, 0, 0] for length in lengths])
    steps = [[drawn(6, 1, heads, dim, dtype=dtype) for heads in (8, 2, 2)] for _ in range(4)]
    prefixes = [drawn(max(lengths), len(lengths), heads, dim, dtype=dtype) for heads in (8, 2, 2)]
    found = []
    for cache_kind, number, place in ((kind, dtype, "cuda"), (DecodeCache, torch.float64, "cpu")):
        prefill = PrefillCache(layout)
        prefill.attend(1, *(tensor.to(place, number) for tensor in prefixes), 0.3)
        cache, outputs = cache_kind(prefill, 2, len(steps)), []
        for step in steps:
            if isinstance(cache, StaticDecodeCache):
                cache.place.fill_(cache.step)
            outputs.append(cache.attend(1, *(tensor.to(place, number) for tensor in step), 0.3).cpu())
            cache.step += 1
        found.append(torch.cat(outputs))
    assert distance(found[0], found[1]) < LIMITS[dtype]

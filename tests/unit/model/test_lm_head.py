"""Log-probabilities by chunks of the vocabulary: the values and gradients of float64, and never all logits at once."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sip.model.lm_head import VocabularyPart, mask_padding_, token_logprobs

ALONE = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
MIB = 2**20


def case(positions: int, columns: int, vocab_size: int, width: int, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, targets and the upstream gradient of each log-probability."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator)
    weight = torch.randn(columns, width, generator=generator) * scale
    targets = torch.randint(0, vocab_size, (positions,), generator=generator)
    return hidden, weight, targets, torch.randn(positions, generator=generator)


def run(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, part: VocabularyPart
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = token_logprobs(hidden, weight, targets, part)
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream)


def float64(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps = F.log_softmax(hidden @ weight[:vocab_size].t(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    return logps.detach(), *torch.autograd.grad(logps, (hidden, weight), upstream.double())


# Of 37 positions a column takes 148 bytes: all 640 columns; several chunks of 128 and more; of 7; of one.
@pytest.mark.parametrize("chunk_bytes", [MIB, 148 * 300, 148 * 200, 148 * 7, 1])
@pytest.mark.parametrize("vocab_size", [640, 515, 200])
def test_values_and_gradients_are_those_of_float64_at_every_size_of_chunk(chunk_bytes: int, vocab_size: int) -> None:
    hidden, weight, targets, upstream = case(37, 640, vocab_size, 24, scale=0.3)
    found = run(hidden, weight, targets, upstream, VocabularyPart(0, vocab_size, chunk_bytes, ALONE))
    wanted = float64(hidden, weight, targets, upstream, vocab_size)
    assert float(((found[0] - wanted[0]) / wanted[0].abs().clamp(min=1)).abs().max()) < 1e-6
    for own, other in zip(found[1:], wanted[1:], strict=True):
        assert float((own - other).norm() / other.norm()) < 1e-5
    assert not found[2][vocab_size:].any(), "padding has a gradient"


def test_logits_far_apart_stay_finite() -> None:
    hidden, weight, targets, upstream = case(16, 256, 256, 24, scale=100.0)
    assert float((hidden @ weight.t()).abs().max()) > 1000
    found = run(hidden, weight, targets, upstream, VocabularyPart(0, 256, 16 * 4 * 10, ALONE))
    wanted = float64(hidden, weight, targets, upstream, 256)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=1e-2, atol=1e-3)


def test_bfloat16_sums_in_float32() -> None:
    hidden, weight, targets, upstream = (t.bfloat16() if t.is_floating_point() else t for t in case(64, 512, 500, 24))
    upstream = upstream.float()
    rounded = F.log_softmax(F.linear(hidden, weight)[:, :500].double(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    exact = float64(hidden, weight, targets, upstream, 500)
    for chunk_bytes in (MIB, 64 * 4 * 100):
        found = run(hidden, weight, targets, upstream, VocabularyPart(0, 500, chunk_bytes, ALONE))
        assert [tensor.dtype for tensor in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
        # Nothing is lost behind the logits, whose own rounding is that of the format.
        torch.testing.assert_close(found[0].double(), rounded, rtol=1e-6, atol=1e-6)
        for own, other in zip(found[1:], exact[1:], strict=True):
            assert float((own.double() - other).norm() / other.norm()) < 0.01


def test_a_frozen_weight_gets_no_gradient_and_without_gradients_nothing_is_kept() -> None:
    hidden, weight, targets, upstream = case(8, 64, 64, 24)
    part = VocabularyPart(0, 64, 8 * 4 * 16, ALONE)
    own = hidden.clone().requires_grad_()
    token_logprobs(own, weight, targets, part).backward(upstream)
    torch.testing.assert_close(own.grad, run(hidden, weight, targets, upstream, part)[1])
    assert weight.grad is None
    with torch.no_grad():
        assert token_logprobs(own, weight, targets, part).grad_fn is None


def test_padding_is_masked_wherever_the_slice_begins() -> None:
    for first, kept in ((0, 8), (6, 4), (10, 0), (40, 0)):
        masked = mask_padding_(torch.zeros(2, 8), first, 10)
        assert masked.isneginf().sum(1).tolist() == [8 - kept] * 2
        assert not masked[:, :kept].any()


class Allocations(TorchDispatchMode):
    """Bytes of the tensors that operations made and that still live: now, at most, and of the largest one."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.largest = max(self.largest, storage.nbytes())
        self.most = max(self.most, sum(self.live.values()))
        return out


@pytest.mark.parametrize(("positions", "gradient"), [(1280, True), (256, True), (1280, False)])
def test_one_chunk_of_logits_exists_at_a_time_at_a_vocabulary_of_128k(positions: int, gradient: bool) -> None:
    """A row of 1280 tokens all of which are scored, and 256 of a suffix pair; all logits are 640 and 128 MiB."""
    hidden, weight, targets, upstream = case(positions, 131_072, 131_000, 8)
    hidden.requires_grad_()
    weight.requires_grad_()
    part = VocabularyPart(0, 131_000, 16 * MIB, ALONE)
    with Allocations() as allocations, torch.set_grad_enabled(gradient):
        logps = token_logprobs(hidden, weight, targets, part)
        if gradient:
            logps.backward(upstream)
    assert 15 * MIB < allocations.largest <= 16 * MIB
    gradients = 4 * (weight.numel() + 4 * hidden.numel()) if gradient else 0
    assert allocations.most <= 16 * MIB + gradients + 64 * positions


def test_what_fits_one_chunk_is_computed_once() -> None:
    hidden, weight, targets, upstream = case(16, 256, 256, 24)
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "mm" in func.__name__:
                products.append(func.__name__)
            return func(*args, **(kwargs or {}))

    counts = []
    for chunk_bytes in (16 * 256 * 4, 16 * 256 * 2):
        products.clear()
        with Products():
            run(hidden, weight, targets, upstream, VocabularyPart(0, 256, chunk_bytes, ALONE))
        counts.append(len(products))
    assert counts == [3, 8], "logits, and one product for each gradient; in two chunks the logits twice"

"""Products with a weight that was laid out once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_sip.model.packed import packs, product_with


@pytest.mark.parametrize("rows", [1, 5, 64], ids=["fewer", "some", "as said"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torchs_own_product(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 40, dtype=dtype), torch.randn(rows, 1, 40, dtype=dtype)
    product = product_with(weight, 64)
    out = product(x)
    assert out.shape == (rows, 1, 48)
    torch.testing.assert_close(out, F.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_keeps_the_weight_as_it_was_where_it_was_packed() -> None:
    weight, x = torch.ones(8, 8), torch.ones(2, 8)
    assert packs(weight), "torch's CPU build has no oneDNN"
    product = product_with(weight, 2)
    weight.zero_()
    assert torch.equal(product(x), torch.full((2, 8), 8.0))

"""Products with a weight that stays as it is over many calls with few rows, as in decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""`x [..., in]` to `x @ weight.T [..., out]`."""


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN can lay out this weight for its kernels (torch's own CPU builds hold it)."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product_with(weight: torch.Tensor, rows: int) -> Product:
    """The product of `[rows, in]` with `weight` `[out, in]` as it is now; no gradient.

    On a CPU a product of few rows spends much of its time on bringing the weight into the order in which it is read.
    oneDNN does that once here, which costs one copy of the weight until the product is given up. Elsewhere this is
    `torch.nn.functional.linear`.
    """
    weight = weight.detach()
    if not packs(weight):
        return lambda x: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

"""One decoding step over prefixes that are kept once, against plain attention over copied keys."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.rollout.cache import DecodeCache, PrefillCache, StaticDecodeCache

HEADS, DIM, ROLLOUTS, STEPS = 4, 8, 3, 4


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of one token `[heads, dim]` over keys `[kv_heads, n, dim]`, in float64."""
    group = query.shape[0] // key.shape[0]
    key, value = (tensor.double().repeat_interleave(group, dim=0) for tensor in (key, value))
    scores = (key @ query.double()[..., None]).squeeze(-1) * scale
    return (torch.softmax(scores, dim=-1)[:, None] @ value).flatten()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 2)], ids=["equal", "different"])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("kind", [DecodeCache, StaticDecodeCache])
def test_a_step_equals_attention_over_copied_keys(
    kind: type[DecodeCache], kv_heads: int, lengths: tuple[int, ...], dtype: torch.dtype, within: float
) -> None:
    draw = torch.Generator().manual_seed(3)
    rows, width, scale = len(lengths) * ROLLOUTS, max(lengths), 0.7

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    prefill = PrefillCache(torch.tensor([[length, 0, 0] for length in lengths]))
    # Scores far above and below each other: each part of the softmax has a peak of its own.
    prefix_key, prefix_value = (
        4 * random(len(lengths), kv_heads, width, DIM),
        random(len(lengths), kv_heads, width, DIM),
    )
    prefill.layers[1] = prefix_key, prefix_value
    cache = kind(prefill, ROLLOUTS, STEPS)
    key, value = 2 * random(rows, STEPS, kv_heads, DIM), random(rows, STEPS, kv_heads, DIM)
    for step in range(STEPS):
        query = random(rows + 1, 1, HEADS, DIM)  # one row of padding
        padded = torch.nn.functional.pad(torch.stack([key[:, step], value[:, step]]), (0, 0, 0, 0, 0, 1))
        if isinstance(cache, StaticDecodeCache):
            cache.place.fill_(step)
        out = cache.attend(1, query, padded[0][:, None], padded[1][:, None], scale)
        cache.step += 1
        assert out.shape == (rows + 1, 1, HEADS * DIM)
        assert bool((out[rows] == 0).all())
        for row in range(rows):
            prefix = row // ROLLOUTS
            length = lengths[prefix]
            keys = torch.cat([prefix_key[prefix, :, :length], key[row, : step + 1].transpose(0, 1)], dim=1)
            values = torch.cat([prefix_value[prefix, :, :length], value[row, : step + 1].transpose(0, 1)], dim=1)
            wanted = plain(query[row, 0], keys, values, scale)
            assert (out[row, 0].double() - wanted).abs().max() < within

"""Zero groups that pad the attention for tensor parallelism: the same function, and zero for ever."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hf_toys import KINDS, toy_llama

from megatron_sip.checkpoint.hf_names import Kind, LlamaShape, padded_query_groups
from megatron_sip.checkpoint.hf_tensors import pack, padding_of


def shape_of(groups_padded: int) -> LlamaShape:
    return LlamaShape(
        num_layers=1,
        hidden_size=36,
        ffn_hidden_size=48,
        num_attention_heads=9,
        num_query_groups=3,
        kv_channels=4,
        vocab_size=101,
        tied=True,
        groups_padded=groups_padded,
        vocab_padded=101,
    )


def weights(groups_padded):
    """The first layer's fused QKV and output projection with so many groups, as trainable leaves."""
    attention = toy_llama(**KINDS["odd_groups_tied"]).double().model.layers[0].self_attn
    shape = shape_of(groups_padded)
    qkv = pack(Kind.QKV, [getattr(attention, f"{name}_proj").weight for name in "qkv"], shape)
    proj = pack(Kind.PROJ, [attention.o_proj.weight], shape)
    return qkv.detach().requires_grad_(), proj.detach().requires_grad_()


def attend(x, qkv, proj):
    """Causal grouped attention over the fused layout: group by group 3 q heads, 1 k, 1 v of width 4. x: [b, s, h]."""
    batch, seq, _ = x.shape
    grouped = (x @ qkv.t()).view(batch, seq, -1, 5, 4).permute(0, 2, 3, 1, 4)  # [b, groups, 5, s, d]
    q, k, v = grouped[:, :, :3].flatten(1, 2), grouped[:, :, 3], grouped[:, :, 4]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) @ proj.t()


def test_number_of_padded_groups():
    assert [padded_query_groups(3, tp) for tp in (1, 2, 3, 4, 8)] == [3, 4, 3, 4, 8]
    assert padded_query_groups(1, 2) == 2


def test_padding_leaves_the_function_and_the_real_gradients_alone():
    x = torch.randn(2, 7, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, padded = weights(3), weights(4)
    expected, found = attend(x, *plain), attend(x, *padded)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for out in (expected, found):
        out.square().sum().backward()
    torch.testing.assert_close(padded[0].grad[:60], plain[0].grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(padded[1].grad[:, :36], plain[1].grad, rtol=1e-10, atol=1e-10)


def test_padding_stays_exactly_zero_under_adamw_with_weight_decay():
    generator = torch.Generator().manual_seed(2)
    qkv, proj = weights(4)
    start = qkv.detach().clone()
    optimizer = torch.optim.AdamW([qkv, proj], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(2, 7, 36, dtype=torch.float64, generator=generator)
        loss = (attend(x, qkv, proj) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for kind, weight in ((Kind.QKV, qkv), (Kind.PROJ, proj)):
            assert padding_of(kind, weight.grad, shape_of(4)).numel() == weight.numel() // 4
            assert not padding_of(kind, weight.grad, shape_of(4)).any()
        optimizer.step()
    assert not padding_of(Kind.QKV, qkv, shape_of(4)).any()
    assert not padding_of(Kind.PROJ, proj, shape_of(4)).any()
    assert (qkv[:60] != start[:60]).all()


def test_padding_that_is_not_zero_would_be_trained():
    """The guard of the test above: one nonzero v row is enough for the padding to wake up."""
    qkv, proj = weights(4)
    with torch.no_grad():
        qkv[-1] = 1.0
    x = torch.randn(2, 7, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    attend(x, qkv, proj).sum().backward()
    assert padding_of(Kind.PROJ, proj.grad, shape_of(4)).any()

"""A stage of the policy for one token a row, on the trained weights, without what only training needs.

A decoding step is so little arithmetic that on a CPU megatron-core's wrappers around each product (autograd functions,
checks, views for the pipeline) take as long as the products. What is left out changes no value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sip.model.attention import RolloutCache
from megatron_sip.model.lm_head import mask_padding_
from megatron_sip.model.packed import Product, product_with
from megatron_sip.model.policy import PolicyModel


@dataclass(frozen=True)
class _Layer:
    """A layer and the products with its weights as they are now."""

    module: torch.nn.Module
    qkv: Product
    proj: Product
    fc1: Product
    fc2: Product

    @staticmethod
    def of(module: torch.nn.Module, rows: int) -> _Layer:
        attention, mlp = module.self_attention, module.mlp
        return _Layer(
            module=module,
            qkv=product_with(attention.linear_qkv.weight, rows),
            proj=product_with(attention.linear_proj.weight, rows),
            fc1=product_with(mlp.linear_fc1.weight, rows),
            fc2=product_with(mlp.linear_fc2.weight, rows),
        )


class DecodeStage:
    """A stage of the policy, called as the policy itself, with its weights as they are when this is made.

    Raises:
        ValueError: `fits` says no.
    """

    def __init__(self, policy: PolicyModel, rows: int) -> None:
        """`rows` is about how many tokens a call will have, for which the products are laid out."""
        if not self.fits(policy):
            raise ValueError("this policy has layers that only megatron-core itself can run")
        self.policy = policy
        self.group = policy.pg_collection.tp
        self.layers = [_Layer.of(layer, rows) for layer in policy.decoder.layers]
        self.head = product_with(policy.head_weight, rows) if policy.post_process else None

    @staticmethod
    def fits(policy: PolicyModel) -> bool:
        """Whether the layers are the local ones, without sequence parallel, whose products are known here."""
        if policy.config.sequence_parallel or policy.config.add_bias_linear:
            return False
        products = [
            (product, kind)
            for layer in policy.decoder.layers
            for product, kind in (
                (layer.self_attention.linear_qkv, ColumnParallelLinear),
                (layer.self_attention.linear_proj, RowParallelLinear),
                (layer.mlp.linear_fc1, ColumnParallelLinear),
                (layer.mlp.linear_fc2, RowParallelLinear),
            )
        ]
        return all(type(product) is kind for product, kind in products)

    def __call__(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: RolloutCache, *_sources: object
    ) -> torch.Tensor:
        """One token of every row.

        input_ids     [1, rows] int64
        position_ids  [1, rows] int64
        returns       last stage: logits [rows, padded_vocab / tp], padding masked; other stages: hidden states
                      [rows, 1, hidden]. Logits are those of all rows, whatever the sources.
        """
        policy = self.policy
        x = policy.embedding(input_ids, position_ids) if policy.pre_process else policy.decoder.input_tensor
        angles = policy.rotary_pos_emb(position_ids)
        cos, sin = angles.cos(), angles.sin()
        sin[..., : sin.shape[-1] // 2].neg_()  # a head's first half takes the second one's share with a minus
        cos, sin = cos.to(x.dtype)[..., None, :], sin.to(x.dtype)[..., None, :]
        for layer in self.layers:
            x = x + self._attention(layer, layer.module.input_layernorm(x), cos, sin, cache)
            x = x + self._mlp(layer, layer.module.pre_mlp_layernorm(x))
        if self.head is None:
            return x
        logits = self.head(policy.decoder.final_layernorm(x)).squeeze(1)
        return mask_padding_(logits, policy.first_column, policy.real_vocab_size)

    def _attention(
        self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: RolloutCache
    ) -> torch.Tensor:
        attention = layer.module.self_attention
        groups = attention.num_query_groups_per_partition
        dim = attention.hidden_size_per_attention_head
        # A group holds its queries, its key and its value; all but the value are turned.
        fused = layer.qkv(x).view(len(x), 1, groups, -1, dim)
        turned, value = _turned(fused[:, :, :, :-1], cos, sin), fused[..., -1, :]
        query, key = turned[:, :, :, :-1].reshape(len(x), 1, -1, dim), turned[..., -1, :]
        core = attention.core_attention
        return self._summed(layer.proj(cache.attend(core.layer_number, query, key, value, core.scale)))

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = layer.fc1(x).chunk(2, dim=-1)
        return self._summed(layer.fc2(F.silu(gate).mul_(up)))

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """Over the tensor parallel ranks, each of which has a part of the inner dimension."""
        if self.group.size() > 1:
            dist.all_reduce(part, group=self.group)
        return part


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions of `[rows, 1, groups, heads, head_dim]`; `cos` and `sin`, negative in its first half, are
    `[rows, 1, 1, 1, head_dim]`."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

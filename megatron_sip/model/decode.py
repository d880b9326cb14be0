"""A stage of the policy for one token a row, on the trained weights, without what only training needs.

A decoding step is so little arithmetic that on a CPU megatron-core's wrappers around each product (autograd functions,
checks, views for the pipeline) take as long as the products. What is left out changes no value.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sip.model.attention import RolloutCache
from megatron_sip.model.policy import PolicyModel


class DecodeStage:
    """The layers of a stage, read from a policy whose parameters may change between two calls.

    Raises:
        ValueError: `fits` says no.
    """

    def __init__(self, policy: PolicyModel) -> None:
        if not self.fits(policy):
            raise ValueError("this policy has layers that only megatron-core itself can run")
        self.policy = policy
        self.group = policy.pg_collection.tp

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

    def hidden(self, x: torch.Tensor, angles: torch.Tensor, cache: RolloutCache) -> torch.Tensor:
        """Through all layers of the stage, and on the last one the final norm.

        x       [rows, 1, hidden], embeddings or what the stage before sent
        angles  [rows, 1, 1, head_dim] of `RowRotary`
        """
        cos, sin = (part.chunk(2, dim=-1)[0].to(x.dtype) for part in (angles.cos(), angles.sin()))
        for layer in self.policy.decoder.layers:
            x = x + self._attention(layer.self_attention, layer.input_layernorm(x), cos, sin, cache)
            x = x + self._mlp(layer.mlp, layer.pre_mlp_layernorm(x))
        norm = self.policy.decoder.final_layernorm
        return x if norm is None else norm(x)

    def _attention(
        self,
        attention: torch.nn.Module,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: RolloutCache,
    ) -> torch.Tensor:
        groups = attention.num_query_groups_per_partition
        dim = attention.hidden_size_per_attention_head
        # A group holds its queries, its key and its value.
        fused = F.linear(x, attention.linear_qkv.weight).view(len(x), 1, groups, -1, dim)
        query, key, value = fused[:, :, :, :-2].reshape(len(x), 1, -1, dim), fused[..., -2, :], fused[..., -1, :]
        core = attention.core_attention
        out = cache.attend(core.layer_number, _turned(query, cos, sin), _turned(key, cos, sin), value, core.scale)
        return self._summed(F.linear(out, attention.linear_proj.weight))

    def _mlp(self, mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, dim=-1)
        return self._summed(F.linear(F.silu(gate) * up, mlp.linear_fc2.weight))

    def _summed(self, part: torch.Tensor) -> torch.Tensor:
        """Over the tensor parallel ranks, each of which has a part of the inner dimension."""
        if self.group.size() > 1:
            dist.all_reduce(part, group=self.group)
        return part


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions `[rows, 1, heads, head_dim]`; `cos` and `sin` are `[rows, 1, 1, head_dim / 2]`."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

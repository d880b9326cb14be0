"""The policy's own log-probabilities of a text, by the weights that are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel.world import World


def policy_logprobs(policy: PolicyModel, world: World, tokens: Sequence[int]) -> tuple[float, ...]:
    """`log p(token)` of all tokens but the first, on every rank of the model-parallel group, all of which call it.

    Weights and training mode are left as they were.
    """
    was_training = policy.training
    policy.eval()
    try:
        # Not inference mode, for the gather buffers of megatron-core (see `rollout/megatron.py`).
        with torch.no_grad():
            found = _through_stages(policy, world, torch.tensor(tokens, dtype=torch.int64, device=world.device))
    finally:
        policy.train(was_training)
    if world.tp_size * world.pp_size > 1:
        dist.broadcast(found, src=world.last_stage_rank - world.tp_rank, group=world.model_parallel_group)
    return tuple(found.tolist())


def _through_stages(policy: PolicyModel, world: World, tokens: torch.Tensor) -> torch.Tensor:
    """`[n - 1]` float32; what it holds counts on the last stage only."""
    multiple = world.tp_size if policy.config.sequence_parallel else 1
    width = -(-len(tokens) // multiple) * multiple
    ids = torch.nn.functional.pad(tokens, (0, width - len(tokens)))[None]
    positions = torch.arange(width, device=world.device)[None]
    layout = torch.tensor([[len(tokens), 0, 0]])
    places = torch.arange(len(tokens) - 1, device=world.device)
    if not world.first_stage:
        shape = (width // multiple, 1, policy.config.hidden_size)
        hidden = torch.empty(shape, dtype=policy.config.pipeline_dtype, device=world.device)
        dist.recv(hidden, group=world.pp_group, group_src=world.pp_rank - 1)
        policy.set_input_tensor(hidden)
    out = policy(ids, positions, layout, (torch.zeros_like(places), places), targets=tokens[1:])
    if world.last_stage:
        return out
    dist.send(out.contiguous(), group=world.pp_group, group_dst=world.pp_rank + 1)
    return torch.empty(len(places), dtype=torch.float32, device=world.device)

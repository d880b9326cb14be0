"""Direct preference optimisation (paper section 5), per row and pure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class DpoTerms:
    """Per-row terms, each `[rows]`; only `loss` carries a gradient.

    chosen_reward, rejected_reward  beta times log-probability of the policy less that of the reference
    margin                          chosen_reward - rejected_reward
    accuracy                        1 where the margin is above 0, else 0
    """

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor
    margin: torch.Tensor
    accuracy: torch.Tensor


def per_token(logps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Summed log-probabilities `[rows]` over `lengths` `[rows]` (length normalisation); an empty part stays 0."""
    return logps / lengths.clamp(min=1).to(logps.dtype)


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> DpoTerms:
    """-log sigmoid(beta [log pi(y+) - log ref(y+)] - beta [log pi(y-) - log ref(y-)]), paper section 5.

    All inputs are `[rows]` log-probabilities summed over the suffix; the reference gets no gradient.
    `logsigmoid` stays finite, with a finite gradient, at any finite margin.
    """
    chosen = beta * (policy_chosen - reference_chosen.detach())
    rejected = beta * (policy_rejected - reference_rejected.detach())
    margin = chosen - rejected
    return DpoTerms(
        loss=-F.logsigmoid(margin),
        chosen_reward=chosen.detach(),
        rejected_reward=rejected.detach(),
        margin=margin.detach(),
        accuracy=(margin.detach() > 0).to(margin.dtype),
    )

"""The reference policy in page-locked host memory beside a policy on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from megatron_sip.config.groups import ReferenceConfig
from megatron_sip.model.reference import ReferencePolicy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_averages_as_the_host_would_and_is_read_at_once() -> None:
    torch.manual_seed(0)
    policy = torch.nn.Linear(2048, 2048, device="cuda")
    reference = ReferencePolicy(
        policy, ReferenceConfig(reference="ema", reference_update_interval=1, reference_ema_decay=0.75)
    )
    assert all(tensor.is_pinned() for tensor in reference.tensors.values())
    wanted = {name: tensor.clone() for name, tensor in reference.tensors.items()}
    for _ in range(3):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn_like(parameter))
        reference.after_optimizer_step()
        for name, parameter in policy.named_parameters():
            wanted[name].lerp_(parameter.detach().cpu(), 0.25)
            torch.testing.assert_close(reference.tensors[name], wanted[name], atol=1e-6, rtol=1e-6)

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


def test_comes_ahead_in_the_format_of_the_policy_and_is_no_older_than_asked_for() -> None:
    torch.manual_seed(0)
    # One tensor is larger than what travels at a time, and no multiple of it.
    policy = torch.nn.Sequential(torch.nn.Linear(4099, 4999), torch.nn.Linear(8, 3)).to("cuda", torch.bfloat16)
    reference = ReferencePolicy(policy, ReferenceConfig(reference="periodic", reference_update_interval=1))
    own = {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}

    def lent() -> dict[str, torch.Tensor]:
        with reference.in_place_of_policy():
            return {name: parameter.detach().cpu() for name, parameter in policy.named_parameters()}

    for ahead in (False, True):
        for tensor in reference.tensors.values():
            tensor.normal_()
        if ahead:
            reference.come()
            reference.come()
        for name, tensor in lent().items():
            assert torch.equal(tensor, reference.tensors[name].bfloat16())
    reference.come()
    reference.after_optimizer_step()
    for name, tensor in lent().items():
        assert torch.equal(tensor, policy.get_parameter(name).cpu()), "what was under way is not the new average"
    assert own == {name: parameter.data_ptr() for name, parameter in policy.named_parameters()}


def test_is_on_its_way_when_asked_for_and_given_up_whole() -> None:
    policy = torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    reference = ReferencePolicy(policy, ReferenceConfig(reference="frozen"))
    delivery = reference._delivery
    assert delivery is not None
    reference.come()
    assert delivery._brought is not None
    under_way = {name: tensor.data_ptr() for name, tensor in delivery._brought.items()}
    with reference.in_place_of_policy():
        assert {name: parameter.data_ptr() for name, parameter in policy.named_parameters()} == under_way
    assert delivery._brought is None
    torch.cuda._sleep(10**9)  # half a second in which the copies cannot begin
    reference.come()
    assert not delivery._stream.query(), "it goes on beside the host"
    reference.stay()
    assert delivery._stream.query(), "the host's tensors are not read any more"
    assert delivery._brought is None

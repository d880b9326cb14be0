"""The reference policy: when it moves, from which weights, and that the policy is left as it was."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from megatron_sip.config.groups import ReferenceConfig
from megatron_sip.errors import CheckpointError, ConfigError
from megatron_sip.model.reference import ReferencePolicy


def policy(value: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    layer = torch.nn.Linear(2, 2, bias=False, dtype=dtype)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def settings(kind: str, interval: int = 2, decay: float = 0.75) -> ReferenceConfig:
    return ReferenceConfig(reference=kind, reference_update_interval=interval, reference_ema_decay=decay)  # type: ignore[arg-type]


class FakeDelivery:
    """Takes the place of the way to a GPU; what is under way has the values that it left with."""

    def __init__(self) -> None:
        self.under_way: dict[str, torch.Tensor] | None = None
        self.begun = 0

    def begin(self, tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self.under_way is None:
            self.begun += 1
            self.under_way = {name: host.to(like.dtype, copy=True) for name, (host, like) in tensors.items()}

    def take(self) -> dict[str, torch.Tensor]:
        assert self.under_way is not None
        taken, self.under_way = self.under_way, None
        return taken

    def drop(self) -> None:
        self.under_way = None


def value_of(reference: ReferencePolicy) -> float:
    return float(reference.tensors["weight"][0, 0])


@pytest.mark.parametrize(
    ("kind", "expected"), [("ema", [1.0, 2.0, 2.0, 2.75]), ("periodic", [1, 5, 5, 5]), ("frozen", [1] * 4)]
)
def test_moves_at_the_interval_alone(kind: str, expected: list[float]) -> None:
    module = policy(1.0)
    reference = ReferencePolicy(module, settings(kind))
    torch.nn.init.constant_(module.weight, 5.0)
    seen = []
    for _ in range(4):
        reference.after_optimizer_step()
        seen.append(value_of(reference))
    # ema by hand: 0.75 * 1 + 0.25 * 5 = 2, then 0.75 * 2 + 0.25 * 5 = 2.75
    assert seen == pytest.approx(expected)


def test_averages_the_fp32_main_weights_not_their_bf16_rounding() -> None:
    module = policy(1.0, torch.bfloat16)
    module.weight.main_param = torch.full((2, 2), 1.0)
    reference = ReferencePolicy(module, settings("ema", interval=1, decay=0.5))
    module.weight.main_param = torch.full((2, 2), 1.0 + 2**-12)  # rounds to 1.0 in bf16
    reference.after_optimizer_step()
    assert value_of(reference) == 1.0 + 2**-13


def test_lends_its_weights_and_gives_the_own_ones_back_even_after_an_error() -> None:
    module = policy(1.0)
    reference = ReferencePolicy(module, settings("frozen"))
    torch.nn.init.constant_(module.weight, 3.0)
    own = module.weight.data_ptr()
    with reference.in_place_of_policy():
        assert float(module.weight[0, 0]) == 1.0
    with pytest.raises(RuntimeError, match="broken"), reference.in_place_of_policy():
        raise RuntimeError("broken")
    assert float(module.weight[0, 0]) == 3.0
    assert module.weight.data_ptr() == own


@pytest.mark.parametrize("kind", ["ema", "periodic", "frozen"])
def test_what_is_under_way_to_a_gpu_is_used_once_and_given_up_where_the_reference_moves(kind: str) -> None:
    module = policy(1.0)
    reference = ReferencePolicy(module, settings(kind, interval=1))
    reference._delivery = delivery = FakeDelivery()  # type: ignore[assignment]
    reference.come()
    reference.come()
    with reference.in_place_of_policy():
        assert float(module.weight[0, 0]) == 1.0
    assert (delivery.begun, delivery.under_way) == (1, None)
    torch.nn.init.constant_(module.weight, 5.0)
    for move in (
        reference.after_optimizer_step,
        reference.copy_policy,
        lambda: reference.load({"weight": torch.full((2, 2), 7.0)}, 4),
    ):
        reference.come()
        move()
        with reference.in_place_of_policy():
            assert float(module.weight[0, 0]) == value_of(reference)
    reference.come()
    reference.stay()
    assert delivery.under_way is None


def test_refuses_sharded_main_weights_where_it_must_follow_them() -> None:
    module = policy()
    module.weight.main_param_sharded = True
    frozen = ReferencePolicy(module, settings("frozen"))
    assert value_of(frozen) == 1.0
    moving = ReferencePolicy(module, settings("ema", interval=1))
    with pytest.raises(ConfigError, match="--use-distributed-optimizer"):
        moving.after_optimizer_step()


def test_refuses_the_weights_of_another_model() -> None:
    reference = ReferencePolicy(policy(), settings("ema"))
    with pytest.raises(CheckpointError, match="other parameters: bias"):
        reference.load({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, 4)
    reference.load({"weight": torch.full((2, 2), 7.0)}, 4)
    assert (value_of(reference), reference.optimizer_steps) == (7.0, 4)

"""The reference policy of DPO: one fp32 copy in host memory, sharded as the policy is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_sip.config.groups import ReferenceConfig
from megatron_sip.errors import CheckpointError, ConfigError
from megatron_sip.model.delivery import DeviceDelivery


def main_parameter(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 value that the optimizer steps: its main copy in bf16 runs, the parameter itself in fp32.

    A moving average of bf16 weights would never move: its steps are below half a unit in the last place.

    Raises:
        ConfigError: the optimizer holds only a shard of it.
    """
    if getattr(parameter, "main_param_sharded", False):
        raise ConfigError(
            "--reference ema and periodic need whole fp32 main weights on each rank; "
            "drop --use-distributed-optimizer or say --reference frozen"
        )
    main = getattr(parameter, "main_param", None)
    return parameter if main is None else main


def _whole_value(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 main value, or the parameter itself where the optimizer shards its main weights."""
    source = parameter if getattr(parameter, "main_param_sharded", False) else main_parameter(parameter)
    return source.detach().view(parameter.shape)


class ReferencePolicy:
    """Holds, updates and lends the reference weights of one rank.

    Starts as a copy of the policy. `ema`: every `reference_update_interval` optimizer steps
    `reference = decay * reference + (1 - decay) * policy`; `periodic`: a fresh copy at that interval;
    `frozen`: never.
    """

    def __init__(self, policy: torch.nn.Module, config: ReferenceConfig) -> None:
        self.policy = policy
        self.config = config
        self.optimizer_steps = 0
        self.tensors = {name: self._host_copy(p) for name, p in policy.named_parameters()}
        self._delivery = DeviceDelivery() if any(p.is_cuda for p in policy.parameters()) else None

    @staticmethod
    def _host_copy(parameter: torch.nn.Parameter) -> torch.Tensor:
        """fp32 copy in (page-locked, with CUDA) host memory."""
        copy = torch.empty(parameter.shape, dtype=torch.float32, pin_memory=parameter.is_cuda)
        return copy.copy_(_whole_value(parameter))

    @torch.no_grad()
    def copy_policy(self) -> None:
        """Become the policy as it is now."""
        self.stay()
        for name, parameter in self.policy.named_parameters():
            self.tensors[name].copy_(_whole_value(parameter))

    @torch.no_grad()
    def after_optimizer_step(self) -> None:
        """Count a step that was taken (not a skipped one) and update when the interval is full."""
        self.optimizer_steps += 1
        due = self.optimizer_steps % self.config.reference_update_interval == 0
        if self.config.reference == "frozen" or not due:
            return
        for parameter in self.policy.parameters():
            main_parameter(parameter)  # refuses what it could only follow in bf16
        if self.config.reference == "periodic":
            self.copy_policy()
            return
        self._follow(1.0 - self.config.reference_ema_decay)

    def _follow(self, weight: float) -> None:
        """`reference += weight * (policy - reference)`, on the policy's device.

        A GPU takes the reference in from page-locked memory, one tensor after the other, and gives it back: two
        transfers at full speed instead of one through pageable memory and an average on the host.
        """
        self.stay()
        for name, parameter in self.policy.named_parameters():
            main = main_parameter(parameter).detach().view(parameter.shape)
            host = self.tensors[name]
            average = host.to(main.device, non_blocking=True).lerp_(main, weight)
            if average is not host:
                host.copy_(average, non_blocking=True)
        if any(parameter.is_cuda for parameter in self.policy.parameters()):
            torch.cuda.current_stream().synchronize()  # the host reads these tensors next

    def come(self) -> None:
        """Begin to bring the weights to the policy's GPU, for who will soon ask for them; without a GPU nothing.

        It goes on beside what the GPU does. They take the policy's memory once more until the block of
        `in_place_of_policy` ends, or `stay` is called.
        """
        if self._delivery:
            self._delivery.begin({name: (self.tensors[name], p) for name, p in self.policy.named_parameters()})

    def stay(self) -> None:
        """Give up what `come` began."""
        if self._delivery:
            self._delivery.drop()

    @contextmanager
    def in_place_of_policy(self) -> Iterator[None]:
        """Run the block with the reference weights in the policy's parameters."""
        parameters = dict(self.policy.named_parameters())
        own = {name: parameter.data for name, parameter in parameters.items()}
        self.come()
        try:
            brought = self._delivery.take() if self._delivery else self.tensors
            for name, parameter in parameters.items():
                # On the host in fp32 this is the reference tensor itself: no copy is made.
                parameter.data = brought[name].to(parameter.dtype)
            del brought
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]

    def load(self, tensors: dict[str, torch.Tensor], optimizer_steps: int) -> None:
        """Take weights from a checkpoint.

        Raises:
            CheckpointError: names or shapes are not this policy's.
        """
        if tensors.keys() != self.tensors.keys():
            different = sorted(tensors.keys() ^ self.tensors.keys())[:3]
            raise CheckpointError(f"the checkpoint's reference policy has other parameters: {', '.join(different)}")
        self.stay()
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        self.optimizer_steps = optimizer_steps

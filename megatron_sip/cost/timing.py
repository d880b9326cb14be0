"""Seconds of one step by part: what its work takes at the speeds that are reached, and what moves data only."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_sip.cost.hardware import Cluster, Efficiency, PartRate
from megatron_sip.cost.memory import Memory
from megatron_sip.cost.parts import spread_of_rollouts, spread_of_training, step_parts
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import ModelSizes

FLOAT = 4


@dataclass(frozen=True)
class PolicySeconds:
    """The policy's parts of a step, one after the other."""

    weight_push: float
    prefill: float
    decode: float
    reference_swap: float
    reference: float
    train: float
    gradient_reduce: float
    optimizer: float
    reference_update: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def rollouts(self) -> float:
        """What the rollouts take, with the way of the weights to them."""
        return self.weight_push + self.prefill + self.decode


def rates(run: RunSettings, cluster: Cluster, efficiency: Efficiency, tp: int) -> dict[str, PartRate]:
    """The speeds of a GPU in each part; `tp` is that of the rollouts. The shares of the peak hold for attention too."""
    peak, memory = 1e12 * cluster.peak_tflops, 1e12 * cluster.memory_bandwidth_tb

    def at(share: float) -> PartRate:
        return PartRate(dense=peak * share, attention=peak * share)

    layer = efficiency.layer_overhead_us if run.by_graphs else efficiency.eager_layer_overhead_us
    if run.rollout_engine == "vllm":
        layer = efficiency.server_layer_overhead_us
    latency = layer + (2 * efficiency.tp_latency_us if tp > 1 else 0)
    decode = PartRate(
        dense=peak * efficiency.decode_mfu,
        attention=peak * efficiency.decode_mfu,
        bandwidth=memory * efficiency.decode_bandwidth_share,
        call_seconds=1e-6 * latency,
    )
    return {
        "prefill": at(efficiency.forward_mfu),
        "decode": decode,
        "reference": at(efficiency.forward_mfu),
        "train": at(efficiency.train_mfu),
    }


def policy_seconds(
    model: ModelSizes, run: RunSettings, cluster: Cluster, efficiency: Efficiency, memory: Memory
) -> PolicySeconds:
    """One step of the policy, without its judge."""
    training = spread_of_training(run, cluster.gpus)
    waves = -(-run.global_batch_size // (training.dp * memory.wave)) if run.rollout_engine == "megatron" else 1
    parts, rollouts = step_parts(model, run, cluster.gpus, waves), spread_of_rollouts(run, cluster.gpus, waves)
    speed = rates(run, cluster, efficiency, rollouts.tp)
    padded = efficiency.row_padding
    train = speed["train"].seconds(parts.train) * padded
    parameters = memory.gradients / FLOAT
    return PolicySeconds(
        weight_push=_push_seconds(model, run, cluster),
        prefill=speed["prefill"].seconds(parts.prefill),
        decode=speed["decode"].seconds(parts.decode) + 1e-6 * efficiency.token_overhead_us * parts.tokens,
        # The fp32 copy on the host goes to the GPU once a step.
        reference_swap=memory.host_reference / (1e9 * cluster.host_bandwidth_gb),
        reference=speed["reference"].seconds(parts.reference) * padded,
        train=train,
        gradient_reduce=_reduce_seconds(run, cluster, memory, training.dp, train / training.groups),
        optimizer=_optimizer_seconds(run, cluster, efficiency, parameters, training.dp),
        # In and out again; the average is made on the GPU.
        reference_update=2 * memory.host_reference / (1e9 * cluster.host_bandwidth_gb) / run.reference_update_interval,
    )


def _push_seconds(model: ModelSizes, run: RunSettings, cluster: Cluster) -> float:
    """Fresh weights to the servers: one rank gathers all and writes them to a folder, then the servers read that."""
    if run.rollout_engine != "vllm":
        return 0.0
    return 2 * run.element_bytes * model.parameters / (1e9 * cluster.weights_folder_gb)


def _reduce_seconds(
    run: RunSettings, cluster: Cluster, memory: Memory, data_parallel: int, micro_batch_seconds: float
) -> float:
    """A ring over the DP ranks moves the fp32 gradients twice. Overlapped, the last backward pass (2/3) hides it."""
    moved = 2 * memory.gradients * (data_parallel - 1) / data_parallel
    seconds = moved / (1e9 * cluster.network_bandwidth_gb)
    return max(0.0, seconds - micro_batch_seconds * 2 / 3) if run.overlap_grad_reduce else seconds


def _optimizer_seconds(
    run: RunSettings, cluster: Cluster, efficiency: Efficiency, parameters: float, data_parallel: int
) -> float:
    """Bound by memory: the norm and Adam each read the gradient; two moments and the main weight are read and written.

    In bf16 the weights are written besides.
    """
    per_parameter = 2 * FLOAT + 3 * 2 * FLOAT + (2 if run.dtype == "bf16" else 0)
    mine = parameters / (data_parallel if run.use_distributed_optimizer else 1)
    return mine * per_parameter / (1e12 * cluster.memory_bandwidth_tb * efficiency.update_bandwidth_share)

"""The machines of a plan, and the share of their speed that each part of a step is believed to reach."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.cost.assumed import assumed, setting

H100 = "NVIDIA's data sheet of the H100 SXM"
MEASURED = "measured on an H200 with megatron-core's local layers, docs/performance.md"


@dataclass(frozen=True)
class Cluster:
    """The trainer's devices."""

    gpus: int = setting(8, "GPUs of the trainer")
    gpu_memory_gb: float = assumed(80.0, "memory of a GPU, 10^9 bytes", H100)
    peak_tflops: float = assumed(989.0, "dense matrix products of a GPU in the run's type, 10^12 operations/s", H100)
    memory_bandwidth_tb: float = assumed(3.35, "memory bandwidth of a GPU, 10^12 bytes/s", H100)
    host_bandwidth_gb: float = assumed(50.0, "host to GPU, 10^9 bytes/s", "ours: PCIe 5 x16 has 64 in theory")
    network_bandwidth_gb: float = assumed(50.0, "network of a GPU, 10^9 bytes/s", "400 Gbit/s a GPU, arXiv 2407.21783")
    weights_folder_gb: float = assumed(
        2.0, "folder of --rollout-weights-dir, 10^9 bytes/s", "ours: a shared file system"
    )
    memory_reserve: float = assumed(0.1, "share of a GPU's memory for context, buffers, fragments", "ours")


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak that are reached, and what each call costs beside it."""

    train_mfu: float = assumed(0.37, "share of the peak in forward and backward", MEASURED)
    forward_mfu: float = assumed(0.37, "share of the peak in prefill and reference", MEASURED + ": the reference")
    decode_mfu: float = assumed(0.40, "share of the peak in decoding where arithmetic bounds it", "ours")
    decode_bandwidth_share: float = assumed(0.60, "share of the memory bandwidth in decoding", "ours")
    update_bandwidth_share: float = assumed(
        0.23, "share of the memory bandwidth in the optimizer", MEASURED + ": torch's Adam"
    )
    layer_overhead_us: float = assumed(130.0, "decoding by CUDA graphs: small kernels of a layer, us", MEASURED)
    eager_layer_overhead_us: float = assumed(440.0, "decoding without them: kernel starts of a layer, us", MEASURED)
    server_layer_overhead_us: float = assumed(40.0, "decoding on a vLLM server: kernels of a layer, us", "ours")
    tp_latency_us: float = assumed(15.0, "decoding: one reduction over TP, microseconds; two a layer", "ours")
    token_overhead_us: float = assumed(200.0, "decoding: sampling of one token of all rows, microseconds", "ours")
    row_padding: float = assumed(1.0, "width of the trained rows over their length", "ours: rows of like length meet")
    overlap_loss: float = assumed(0.1, "share of the shorter of policy and judge that lag 1 does not hide", "ours")


@dataclass(frozen=True)
class PartWork:
    """What the busiest device does in one part of a step, in sequence.

    dense            operations in linear layers and LM head
    attention        operations in attention
    dense_bytes      bytes of weights read
    attention_bytes  bytes of keys and values read
    calls            calls of one layer
    """

    dense: float = 0.0
    attention: float = 0.0
    dense_bytes: float = 0.0
    attention_bytes: float = 0.0
    calls: float = 0.0

    def __mul__(self, times: float) -> PartWork:
        return PartWork(**{name: value * times for name, value in vars(self).items()})


@dataclass(frozen=True)
class PartRate:
    """Speeds of one part: operations/s and bytes/s that are reached, and seconds beside them for each layer call."""

    dense: float
    attention: float
    bandwidth: float = float("inf")
    call_seconds: float = 0.0

    def seconds(self, work: PartWork) -> float:
        """Linear layers and attention follow each other; each is bound by arithmetic or by memory."""
        dense = max(work.dense / self.dense, work.dense_bytes / self.bandwidth)
        attention = max(work.attention / self.attention, work.attention_bytes / self.bandwidth)
        return dense + attention + work.calls * self.call_seconds

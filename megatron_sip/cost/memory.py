"""Memory of one trainer GPU, summed over what the code allocates (docs/scaling.md), for the fullest pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.checkpoint.hf_names import padded_vocab_size
from megatron_sip.config.groups import ModelConfig
from megatron_sip.config.stages import largest_stage
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.rollout.wave_memory import StageSizes, WaveBytes, WaveShape, even_wave, most_prefixes, wave_bytes

FLOAT = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, and on the host for each rank.

    The static ones are there all the time; of training, reference and rollouts only one at a time. The last two are
    those of a GPU of the vllm engine: weights, and keys and values of all rows that it gets in a step.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reference_pass: float
    rollouts: WaveBytes
    host_reference: float
    wave: int
    server_weights: float = 0.0
    server_cache: float = 0.0

    @property
    def static(self) -> float:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """The most at any time."""
        return self.static + max(self.activations + self.logits, self.reference_pass, self.rollouts.peak)


def stage_parameters(model: ModelSizes, run: RunSettings) -> float:
    """Parameters of one rank on the fullest stage.

    With PP above 1 either end holds a vocabulary matrix: the embedding, or the LM head (a copy where they are tied).
    """
    stages = run.pipeline_model_parallel_size
    layers = largest_stage(model.num_layers, stages)
    matrices = 1 if stages > 1 or not model.untied else 2
    per_layer = model.layer_matmul_parameters + 2 * model.hidden_size
    return (layers * per_layer + matrices * model.head_parameters) / run.tensor_model_parallel_size


def layer_activation_bytes(model: ModelSizes, run: RunSettings) -> float:
    """Bytes that one token leaves in one layer for the backward pass, on one TP rank.

    Kept whole, or split by sequence parallel: input and output of both norms. Split over TP: queries, keys and values
    (those of the prefix twice, for either suffix), the output of attention and its copy in the row's order, and in
    SwiGLU both halves of the first product, the gate behind SiLU, and their product.
    """
    tp = run.tensor_model_parallel_size
    heads, groups = model.num_attention_heads, model.num_query_groups
    split = (3 * heads + 4 * groups) * model.kv_channels + 4 * model.ffn_hidden_size
    whole = 4 * model.hidden_size / (tp if run.sequence_parallel else 1)
    return run.element_bytes * (whole + split / tp)


def _activations(model: ModelSizes, run: RunSettings, data_parallel: int, row_padding: float) -> float:
    """What the micro-batches in flight keep; the first stage of 1F1B has as many of them as there are stages."""
    stages = run.pipeline_model_parallel_size
    layers = largest_stage(model.num_layers, stages)
    in_flight = min(stages, max(1, run.global_batch_size // (data_parallel * run.micro_batch_size)))
    tokens = run.micro_batch_size * run.work().row_tokens * row_padding
    layer = layer_activation_bytes(model, run)
    if run.recompute_granularity == "none":
        return in_flight * tokens * layers * layer
    split = run.tensor_model_parallel_size if run.sequence_parallel else 1
    kept = run.element_bytes * model.hidden_size / split
    return tokens * (in_flight * layers * kept + layer)


def rollout_sizes(model: ModelSizes, run: RunSettings) -> StageSizes:
    """Those of a rank on the fullest stage, and of the LM head, as if that stage had it.

    `model` is the policy as it is trained, whose query groups TP divides.
    """
    tp = run.tensor_model_parallel_size
    vocabulary = padded_vocab_size(model.vocab_size, ModelConfig.make_vocab_size_divisible_by, tp)
    return StageSizes(
        layers=largest_stage(model.num_layers, run.pipeline_model_parallel_size),
        hidden=model.hidden_size,
        heads=model.num_attention_heads // tp,
        groups=model.num_query_groups // tp,
        head_width=model.kv_channels,
        ffn=model.ffn_hidden_size // tp,
        columns=vocabulary // tp,
        tp=tp,
        element=run.element_bytes,
    )


def rollout_shape(run: RunSettings) -> WaveShape:
    """How the run writes a wave, with prefixes of the mean length; sampled at temperature 1 without a nucleus."""
    return WaveShape(
        width=run.prefix_length,
        rollouts=run.num_rollouts,
        tokens=run.suffix_length,
        pipelined=run.rollout_pipeline_groups or run.pipeline_model_parallel_size,
        copies=1 if run.prefill_once else run.num_rollouts,
    )


def logit_bytes(model: ModelSizes, run: RunSettings) -> int:
    """Bytes of a micro-batch's logits in float32 on one rank: all scored positions, its columns of the vocabulary."""
    work, tp = run.work(), run.tensor_model_parallel_size
    scored = run.micro_batch_size * (work.suffixes * work.suffix + (work.prefix - 1 if work.prefix_logits else 0))
    vocabulary = padded_vocab_size(model.vocab_size, ModelConfig.make_vocab_size_divisible_by, tp)
    return FLOAT * scored * (vocabulary // tp)


def is_chunked(model: ModelSizes, run: RunSettings) -> bool:
    """Whether these are more than --logits-chunk-mib, so that training makes them in chunks, and once more."""
    return logit_bytes(model, run) > run.logits_chunk_mib * 2**20


def _rollouts(model: ModelSizes, run: RunSettings, share: int, room: float) -> tuple[int, WaveBytes]:
    """Prefixes of a wave, and what it takes: as many as are given, or as fit the `room`, but one at least.

    `share` are the prefixes of a DP rank.
    """
    if run.rollout_engine != "megatron" or run.num_rollouts == 0:
        return share, WaveBytes(0, 0, 0, 0, 0)
    sizes, shape = rollout_sizes(model, run), rollout_shape(run)
    if run.rollout_batch_size is not None:
        wave = min(share, run.rollout_batch_size)
    else:
        wave = even_wave(share, max(1, most_prefixes(sizes, shape, room, share)))
    return wave, wave_bytes(sizes, shape, wave)


def server_bytes(model: ModelSizes, run: RunSettings) -> tuple[float, float]:
    """Weights, and keys and values of a step's rows, on a GPU of the vllm engine; a prefix's pages are kept once."""
    if run.rollout_engine != "vllm":
        return 0.0, 0.0
    tokens = run.prefix_length + run.num_rollouts * run.suffix_length
    cached = model.cache_elements_per_token * tokens * run.global_batch_size / run.rollout_gpus
    return run.element_bytes * model.parameters / run.rollout_tensor_parallel_size, run.element_bytes * cached


def memory_per_gpu(
    model: ModelSizes, run: RunSettings, data_parallel: int, usable_bytes: float, row_padding: float = 1.0
) -> Memory:
    """The sum, for the policy as it is trained.

    Without a given wave the largest that fits `usable_bytes` is taken, of one prefix at least.
    """
    n, size = stage_parameters(model, run), run.element_bytes
    work = run.work()
    # A chunk in fp32, whose gradient takes its place, and one of these in the run's type beside it.
    logits = min(logit_bytes(model, run), run.logits_chunk_mib * 2**20) * (1 + (size / FLOAT if size < FLOAT else 0))
    # fp32 runs step the weights themselves; bf16 runs keep fp32 main weights beside them. Adam has two moments.
    state = (2 * FLOAT + (FLOAT if size == 2 else 0)) * n
    forward = run.micro_batch_size * work.row_tokens * row_padding * layer_activation_bytes(model, run)
    static = size * n + FLOAT * n + state / (data_parallel if run.use_distributed_optimizer else 1)
    share = -(-run.global_batch_size // data_parallel)
    wave, rollouts = _rollouts(model, run, share, usable_bytes - static)
    return Memory(
        weights=size * n,
        gradients=FLOAT * n,
        optimizer=state / (data_parallel if run.use_distributed_optimizer else 1),
        activations=_activations(model, run, data_parallel, row_padding),
        logits=logits,
        reference_pass=size * n + forward + logits if work.reference else 0.0,
        rollouts=rollouts,
        host_reference=FLOAT * n if work.reference else 0.0,
        wave=wave,
        server_weights=server_bytes(model, run)[0],
        server_cache=server_bytes(model, run)[1],
    )

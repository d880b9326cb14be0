"""The one place that names megatron-core's model class, layer specs and transformer config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sip.checkpoint.hf_names import llama_shape, padded_query_groups, padded_vocab_size
from megatron_sip.checkpoint.hf_tensors import zero_padded_groups
from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.config.stages import uneven_ends
from megatron_sip.errors import ConfigError
from megatron_sip.model.attention import SharedPrefixAttention
from megatron_sip.model.installed import has_transformer_engine
from megatron_sip.model.last_layer import LastLayer
from megatron_sip.model.policy import PolicyModel
from megatron_sip.model.rotary import inverse_frequencies
from megatron_sip.parallel.world import World


class RMSNorm(torch.nn.Module):
    """torch's RMSNorm in megatron-core's slot, also under sequence parallel.

    megatron-core's own wrapper refuses sequence parallel; what that needs is the mark on the weight, by
    which its gradient is summed over the tensor parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def use_transformer_engine(config: ModelConfig) -> bool:
    """Whether the layers come from Transformer Engine.

    Raises:
        ConfigError: it was asked for and is not usable here.
    """
    if config.transformer_impl == "local":
        return False
    usable = torch.cuda.is_available() and has_transformer_engine()
    if config.transformer_impl == "transformer_engine" and not usable:
        raise ConfigError(
            "--transformer-impl transformer_engine: no GPU, or Transformer Engine is not installed; "
            "install the extra 'te' or say --transformer-impl local"
        )
    return usable


def _given(value: Any, flag: str) -> Any:
    """A size that the preset, the flags or the checkpoint must have filled by now."""
    if value is None:
        raise ConfigError(f"{flag} is not set; give it or choose a --model-preset")
    return value


def attention_sizes(model: ModelConfig, tp_size: int) -> tuple[int, int, int]:
    """Query heads, query groups and head width of the policy.

    Where TP does not divide the query groups, groups of zeros are added until it does (SmolLM2-135M has 3):
    their output projection columns are zero, so they contribute nothing, and stay zero under training.
    """
    heads = _given(model.num_attention_heads, "--num-attention-heads")
    groups = _given(model.num_query_groups, "--num-query-groups")
    head_dim = model.kv_channels or _given(model.hidden_size, "--hidden-size") // heads
    padded = padded_query_groups(groups, tp_size)
    return padded * (heads // groups), padded, head_dim


def transformer_config(config: Config, device: torch.device) -> TransformerConfig:
    """megatron-core's view of our settings. `config.model` must be resolved."""
    model, parallel = config.model, config.parallel
    heads, groups, head_dim = attention_sizes(model, parallel.tensor_model_parallel_size)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    layers = _given(model.num_layers, "--num-layers")
    first, last = uneven_ends(layers, parallel.pipeline_model_parallel_size) or (None, None)
    return TransformerConfig(
        num_layers=layers,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        hidden_size=_given(model.hidden_size, "--hidden-size"),
        ffn_hidden_size=_given(model.ffn_hidden_size, "--ffn-hidden-size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=_given(model.norm_epsilon, "--norm-epsilon"),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.training.bf16,
        use_cpu_initialization=device.type != "cuda",
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        recompute_granularity=model.recompute_granularity,
        recompute_method="uniform" if model.recompute_granularity == "full" else None,
        recompute_num_layers=model.recompute_num_layers if model.recompute_granularity == "full" else None,
        # Nothing to fuse where there is neither bias nor dropout, and megatron-core would compile it for every shape.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,  # positions differ by row
    )


def _block_spec(config: TransformerConfig, with_te: bool, last_stage: bool) -> TransformerBlockSubmodules:
    """The layers of this stage, each with our attention in the core slot; the policy's last one is `LastLayer`."""
    if with_te:
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(), TENorm
    else:
        layer, norm = get_gpt_layer_local_spec(normalization="RMSNorm"), RMSNorm
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
    attention: ModuleSpec = layer.submodules.self_attention
    attention.submodules.core_attention = SharedPrefixAttention
    layers = [layer] * get_num_layers_to_build(config)
    if last_stage:
        layers[-1] = replace(layer, module=LastLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def build_policy(config: Config, world: World) -> PolicyModel:
    """This rank's stage of the policy on its device, in the run's dtype, initialised from `--seed`.

    Raises:
        ConfigError: a size is missing, or Transformer Engine was asked for and is not there.
    """
    model = config.model
    core = transformer_config(config, world.device)
    frequencies = inverse_frequencies(
        core.kv_channels,
        _given(model.rotary_base, "--rotary-base"),
        scaling_factor=model.rope_scaling_factor,
        low_freq_factor=model.rope_low_freq_factor,
        high_freq_factor=model.rope_high_freq_factor,
        original_max_position=model.rope_original_max_position,
    )
    vocab_size = _given(model.vocab_size, "--vocab-size")
    policy = PolicyModel(
        real_vocab_size=vocab_size,
        frequencies=frequencies,
        logits_chunk_bytes=config.training.logits_chunk_mib * 2**20,
        config=core,
        transformer_layer_spec=_block_spec(core, use_transformer_engine(model), world.last_stage),
        vocab_size=padded_vocab_size(vocab_size, model.make_vocab_size_divisible_by, world.tp_size),
        max_sequence_length=_given(model.max_position_embeddings, "--max-position-embeddings"),
        pre_process=world.first_stage,
        post_process=world.last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        # The angles come from RowRotary; 'none' keeps megatron-core from making a table of its own.
        position_embedding_type="none",
    )
    shape = llama_shape(model).with_padding(core.num_query_groups, policy.vocab_size)
    zero_padded_groups(dict(policy.named_parameters()), shape, tp_rank=world.tp_rank, tp_size=world.tp_size)
    return policy.to(world.device)


def first_layer(policy: PolicyModel) -> int:
    """Global number (from 0) of this stage's first layer."""
    return int(policy.decoder.layers[0].layer_number) - 1

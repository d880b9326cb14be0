"""Architectures by name, the filling of sizes that were not given, and the closed-form parameter count."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from megatron_sip.config.fields import flag_of, nearest
from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.errors import ConfigError

_LLAMA_TINY = ModelConfig(
    # Wide and shallow, because on a CPU a layer's fixed cost counts; 8,064,384 parameters at vocabulary 4096.
    num_layers=4,
    hidden_size=384,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    num_query_groups=4,
    max_position_embeddings=2048,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=False,
)
_LLAMA_9M6 = ModelConfig(
    # What docs/performance.md times on two CPU cores: 9,629,760 parameters at vocabulary 4096.
    num_layers=6,
    hidden_size=320,
    ffn_hidden_size=896,
    num_attention_heads=8,
    num_query_groups=4,
    max_position_embeddings=2048,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
)
_SMOLLM2_135M = ModelConfig(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    max_position_embeddings=8192,
    rotary_base=100000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=False,
    vocab_size=49152,
)
_LLAMA_1B4 = ModelConfig(
    # The paper names 1.4B and no sizes; these are ours in the proportions of Llama 2: 1,364,297,728 parameters
    # with its vocabulary of 32,000. Sequences are 2048 tokens at most (paper section 2).
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=16,
    num_query_groups=16,
    max_position_embeddings=2048,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
)
_LLAMA32_1B = ModelConfig(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    max_position_embeddings=131072,
    rotary_base=500000.0,
    rope_scaling_factor=32.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=False,
    vocab_size=128256,
)
_LLAMA3_8B = ModelConfig(
    # Llama 3.0: 8192 positions and no rope scaling.
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    max_position_embeddings=8192,
    rotary_base=500000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
    vocab_size=128256,
)
_LLAMA3_70B = ModelConfig(
    # Llama 3.0, as the 8B.
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
    max_position_embeddings=8192,
    rotary_base=500000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
    vocab_size=128256,
)

# What has no size of its own to give: filled from others, or absent in most models.
_MAY_STAY_NONE = {"model_preset", "kv_channels", "vocab_size", "rope_scaling_factor", "recompute_granularity"}


def presets() -> dict[str, ModelConfig]:
    """The architectures that `--model-preset` knows; a vocabulary of None means the tokenizer's."""
    return {
        "llama-tiny": _LLAMA_TINY,
        "llama-9.6m": _LLAMA_9M6,
        "smollm2-135m": _SMOLLM2_135M,
        "llama-1.4b": _LLAMA_1B4,
        "llama3.2-1b": _LLAMA32_1B,
        "llama3-8b": _LLAMA3_8B,
        "llama3-70b": _LLAMA3_70B,
    }


def with_preset(model: ModelConfig) -> ModelConfig:
    """`model` with what its preset knows in the fields that are None, and the head width where it follows.

    Raises:
        ConfigError: an unknown preset, or a head width that does not follow from the sizes.
    """
    if model.model_preset is not None:
        known = presets()
        if model.model_preset not in known:
            guess = nearest(model.model_preset, known)
            hint = f"did you mean {guess}? " if guess else ""
            raise ConfigError(f"--model-preset {model.model_preset} is unknown; {hint}there are {', '.join(known)}")
        preset = known[model.model_preset]
        missing = {item.name for item in fields(model) if getattr(model, item.name) is None}
        model = replace(model, **{name: getattr(preset, name) for name in missing})
    return _with_head_width(model)


def _with_head_width(model: ModelConfig) -> ModelConfig:
    hidden, heads = model.hidden_size, model.num_attention_heads
    if model.kv_channels is not None or hidden is None or heads is None:
        return model
    if heads < 1 or hidden % heads:
        raise ConfigError(
            f"--num-attention-heads {heads} does not divide --hidden-size {hidden}; "
            "change one of them or give --kv-channels, the width of one head"
        )
    return replace(model, kv_channels=hidden // heads)


def require_sizes(model: ModelConfig) -> None:
    """Raise ConfigError naming every size that is still None."""
    missing = [
        flag_of(item.name)
        for item in fields(model)
        if item.name not in _MAY_STAY_NONE and getattr(model, item.name) is None
    ]
    if missing:
        raise ConfigError(
            f"the model is not fully described: {', '.join(missing)} not given; give them, choose a --model-preset "
            f"({', '.join(presets())}) or --load a Hugging Face Llama folder"
        )


def resolve_model(config: Config, tokenizer_vocab_size: int) -> Config:
    """`config` with every size of the model filled in: given values, else the preset's, else the tokenizer's.

    The vocabulary of a published preset is the published one; those of our own sizes take the tokenizer's.

    Raises:
        ConfigError: an unknown preset, or a size that nobody gave.
    """
    model = with_preset(config.model)
    require_sizes(model)
    if model.vocab_size is None:
        model = replace(model, vocab_size=tokenizer_vocab_size)
    return replace(config, model=model)


def parameter_count(model: ModelConfig) -> int:
    """Parameters of the Llama that `model` describes, without padding of vocabulary or heads.

    Embedding (and head, if untied), per layer q, k, v and output projections, the three matrices of SwiGLU and
    two RMSNorms, and one RMSNorm at the end.

    Raises:
        ConfigError: a size is missing; the message names the flags.
    """
    model = with_preset(model)
    require_sizes(model)
    hidden, width = _size(model, "hidden_size"), _size(model, "kv_channels")
    heads, groups = _size(model, "num_attention_heads"), _size(model, "num_query_groups")
    attention = 2 * hidden * width * (heads + groups)
    layer = attention + 3 * hidden * _size(model, "ffn_hidden_size") + 2 * hidden
    embeddings = (2 if model.untie_embeddings_and_output_weights else 1) * _size(model, "vocab_size") * hidden
    return embeddings + _size(model, "num_layers") * layer + hidden


def _size(model: ModelConfig, name: str) -> int:
    value: Any = getattr(model, name)
    if value is None:
        raise ConfigError(f"{flag_of(name)} is not given")
    return int(value)

"""config.json of a Hugging Face Llama: read into our model settings, and written from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sip.checkpoint.safetensors_io import require_safetensors
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

ARCHITECTURE = "LlamaForCausalLM"
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_LLAMA3_KEYS}
_COMPARED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "vocab_size",
    "rotary_base",
    "rope_scaling_factor",
    "norm_epsilon",
    "untie_embeddings_and_output_weights",
)
_COMPARED_WITH_SCALING = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_position")


def is_hf_folder(folder: str | Path) -> bool:
    """Whether `--load` names a Hugging Face folder and not one of our checkpoints."""
    path = Path(folder)
    return (path / "config.json").is_file() and not (path / "latest_checkpointed_iteration.txt").exists()


def model_config_from_hf(folder: str | Path) -> ModelConfig:
    """The architecture of a Hugging Face Llama folder as our settings; fields that it does not know keep defaults.

    Keys that the Llama format lets a config leave out (`head_dim`, `num_key_value_heads`, `rope_theta`,
    `rms_norm_eps`, `tie_word_embeddings`, `max_position_embeddings`) have the values that the format gives them
    (transformers' LlamaConfig).

    Raises:
        CheckpointError: no config.json, no safetensors, or a model that the policy cannot be; the message says which.
    """
    path = Path(folder)
    require_safetensors(path)
    raw = _read_json(path / "config.json")
    where = str(path / "config.json")
    _refuse_what_is_not_llama(raw, where)
    hidden = _positive_int(raw, "hidden_size", where)
    heads = _positive_int(raw, "num_attention_heads", where)
    groups = _positive_int(raw, "num_key_value_heads", where, absent=heads)
    if heads % groups:
        raise CheckpointError(f"{where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"{where}: no head_dim, and num_attention_heads {heads} does not divide {hidden}")
    head_dim = _positive_int(raw, "head_dim", where, absent=hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{where}: heads are {head_dim} wide, and rotary positions need an even width")
    return ModelConfig(
        num_layers=_positive_int(raw, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_positive_int(raw, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        max_position_embeddings=_positive_int(raw, "max_position_embeddings", where, absent=2048),
        norm_epsilon=_positive_number(raw, "rms_norm_eps", where, absent=1e-6),
        untie_embeddings_and_output_weights=not _flag(raw, "tie_word_embeddings", where),
        vocab_size=_positive_int(raw, "vocab_size", where),
        **_rope(raw, where),
    )


def config_in_type(folder: str | Path, dtype: torch.dtype) -> dict[str, Any]:
    """The folder's own config.json with another type of the weights, in the spellings of transformers 4 and 5.

    Raises:
        CheckpointError: it cannot be read.
    """
    name = str(dtype).removeprefix("torch.")
    return _read_json(Path(folder) / "config.json") | {"dtype": name, "torch_dtype": name}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return raw


def _refuse_what_is_not_llama(raw: Mapping[str, Any], where: str) -> None:
    """Name what the policy does not have, before any weight is read."""
    if raw.get("architectures") != [ARCHITECTURE] or raw.get("model_type") not in (None, "llama"):
        found = f"architectures {raw.get('architectures')}, model_type {raw.get('model_type')!r}"
        raise CheckpointError(f"{where}: {found}; only {ARCHITECTURE} (model_type 'llama') can be loaded")
    if raw.get("auto_map"):
        raise CheckpointError(f"{where}: auto_map names code of the model's own, which is never run")
    for key in ("attention_bias", "mlp_bias"):
        if _flag(raw, key, where):
            raise CheckpointError(f"{where}: {key} is true; models with biases are not supported")
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise CheckpointError(f"{where}: {key} is set; quantised models are not supported, dequantise it first")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if raw.get(key):
            raise CheckpointError(f"{where}: {key} is {raw[key]}; mixture-of-experts models are not supported")
    kinds = raw.get("layer_types") or []
    if raw.get("sliding_window") or any(kind != "full_attention" for kind in kinds):
        raise CheckpointError(f"{where}: sliding window attention (sliding_window, layer_types) is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{where}: hidden_act is {raw['hidden_act']!r}; only 'silu' is supported")


def _rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rotary settings in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters` (transformers 5)."""
    spellings = [raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}, {"rope_theta": raw.get("rope_theta")}]
    rope: dict[str, Any] = {}
    for spelling in spellings:
        if not isinstance(spelling, dict):
            raise CheckpointError(f"{where}: rope_scaling or rope_parameters is not an object")
        for key, value in spelling.items():
            if value is not None and rope.setdefault(key, value) != value:
                raise CheckpointError(f"{where}: {key} is given twice, as {rope[key]} and {value}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("type", kind) != kind:
        raise CheckpointError(f"{where}: rope_type is {kind!r}, and its older spelling type is {rope['type']!r}")
    partial = raw.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor {partial} is not supported")
    settings: dict[str, Any] = {"rotary_base": _positive_number(rope, "rope_theta", where, absent=10000.0)}
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{where}: rope scaling of type {kind!r} is not supported, only 'llama3'")
    unknown = sorted(rope.keys() - _ROPE_KEYS)
    if unknown:  # a key for each kind of layer, for instance
        raise CheckpointError(f"{where}: {unknown[0]} in rope_scaling or rope_parameters is not supported")
    if kind == "default":
        return settings
    factor, low, high = (_positive_number(rope, key, where) for key in _LLAMA3_KEYS[:3])
    return settings | {
        "rope_scaling_factor": factor,
        "rope_low_freq_factor": low,
        "rope_high_freq_factor": high,
        "rope_original_max_position": _positive_int(rope, _LLAMA3_KEYS[3], where),
    }


def _positive_int(raw: Mapping[str, Any], key: str, where: str, absent: int | None = None) -> int:
    value = raw.get(key) if raw.get(key) is not None else absent
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where}: {key} is {raw.get(key)!r}, expected a positive whole number")
    return value


def _positive_number(raw: Mapping[str, Any], key: str, where: str, absent: float | None = None) -> float:
    value = raw.get(key) if raw.get(key) is not None else absent
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{where}: {key} is {raw.get(key)!r}, expected a positive number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected true or false")
    return bool(value)


def _head_dim(model: ModelConfig) -> int | None:
    """Width of one head; None where the sizes that give it are missing."""
    if model.kv_channels is not None or model.hidden_size is None or model.num_attention_heads is None:
        return model.kv_channels
    return model.hidden_size // model.num_attention_heads


def model_differences(stored: ModelConfig, model: ModelConfig, source: str) -> list[str]:
    """A clause for each flag by which two architectures differ, and which weights of the one would not mean the same.

    stored  the architecture that belongs to the weights, as `source` (a file's name) tells it; both are resolved
    """
    names = _COMPARED + (_COMPARED_WITH_SCALING if stored.rope_scaling_factor is not None else ())
    theirs, ours = (replace(one, kv_channels=_head_dim(one)) for one in (stored, model))
    return [
        f"--{name.replace('_', '-')} is {getattr(ours, name)}, {source} says {getattr(theirs, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]


def require_same_model(hf: ModelConfig, model: ModelConfig, folder: str | Path) -> None:
    """Refuse to fill a policy with weights that were trained as another model.

    Raises:
        CheckpointError: naming every flag that disagrees with config.json.
    """
    wrong = model_differences(hf, model, "config.json")
    if wrong:
        raise CheckpointError(f"{folder} is another model: {'; '.join(wrong)}. Leave these flags out to take its own")


def hf_config_from_model(
    model: ModelConfig, dtype: torch.dtype, special_ids: Mapping[str, int | None] | None = None
) -> dict[str, Any]:
    """config.json for an exported model, in the spellings of transformers 4 and 5.

    special_ids  `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer; what is missing is written as
                 null, because a reader would else assume Llama 2's ids
    """
    scaling: dict[str, Any] | None = None
    if model.rope_scaling_factor is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            "low_freq_factor": model.rope_low_freq_factor,
            "high_freq_factor": model.rope_high_freq_factor,
            "original_max_position_embeddings": model.rope_original_max_position,
        }
    dtype_name = str(dtype).removeprefix("torch.")
    ids = {key: (special_ids or {}).get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": _head_dim(model),
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})},
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        **ids,
    }

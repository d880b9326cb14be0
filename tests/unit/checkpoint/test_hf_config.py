"""config.json: what is read, what is refused by name, and that both spellings of rope mean the same."""

from __future__ import annotations

import json

import pytest
import torch
from hf_toys import toy_llama
from transformers import LlamaConfig

from megatron_sip.checkpoint.hf_config import hf_config_from_model, is_hf_folder, model_config_from_hf
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}


@pytest.fixture
def folder(tmp_path):
    toy_llama(tmp_path, head_dim=12, tie_word_embeddings=True)
    return tmp_path


def rewrite(folder, drop=(), **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in drop}))


def test_every_size_is_read(folder):
    assert model_config_from_hf(folder) == ModelConfig(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        max_position_embeddings=64,
        rotary_base=10000.0,
        norm_epsilon=1e-5,
        untie_embeddings_and_output_weights=False,
        vocab_size=101,
    )


def test_left_out_keys_mean_what_transformers_takes_them_for(folder):
    optional = ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    rewrite(folder, drop=(*optional, "rope_parameters"))
    model, reference = model_config_from_hf(folder), LlamaConfig.from_pretrained(folder)
    assert model.kv_channels == reference.head_dim == 8
    assert model.num_query_groups == reference.num_key_value_heads == 4
    assert model.norm_epsilon == reference.rms_norm_eps
    assert model.untie_embeddings_and_output_weights is not reference.tie_word_embeddings
    assert model.max_position_embeddings == reference.max_position_embeddings
    assert model.rotary_base == reference.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 7.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 7.0, "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 7, "rope_scaling": None, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
    ],
)
def test_rope_in_both_spellings(folder, spelling):
    rewrite(folder, drop=("rope_parameters",) if "rope_parameters" not in spelling else (), **spelling)
    model = model_config_from_hf(folder)
    assert (model.rotary_base, model.rope_scaling_factor) == (7.0, 8.0)
    assert (model.rope_low_freq_factor, model.rope_high_freq_factor) == (1.0, 4.0)
    assert model.rope_original_max_position == 4096


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": None}, "architectures None"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"num_local_experts": 8}, "mixture-of-experts"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is None"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention in rope_scaling or"),
        ({"rope_parameters": {"rope_type": "default", "type": "llama3", **LLAMA3}}, "older spelling type is 'llama3'"),
        ({"rope_parameters": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 2.5}}, "is 2.5"),
        ({"rope_parameters": 7}, "is not an object"),
        ({"head_dim": 13}, "13 wide"),
        ({"compression_config": {"format": "float-quantized"}}, "quantised"),
        ({"num_experts": 4}, "mixture-of-experts"),
        ({"n_routed_experts": 4}, "mixture-of-experts"),
        ({"rope_theta": 3.0}, "rope_theta is given twice"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_what_the_policy_cannot_be_is_refused_by_name(folder, change, named):
    rewrite(folder, **change)
    with pytest.raises(CheckpointError, match=named):
        model_config_from_hf(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_broken_config_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model_config_from_hf(folder)


def test_folders_of_other_formats_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled \.bin"):
        model_config_from_hf(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.gguf")
    with pytest.raises(CheckpointError, match="GGUF"):
        model_config_from_hf(folder)
    (folder / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        model_config_from_hf(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        model_config_from_hf(folder / "nowhere")


def test_a_checkpoint_of_our_own_is_not_taken_for_one_of_hugging_face(folder):
    assert is_hf_folder(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    assert not is_hf_folder(folder)


def test_written_config_reads_back_and_names_no_llama2_ids(folder):
    rewrite(folder, rope_parameters={"rope_theta": 7.0, "rope_type": "llama3", **LLAMA3})
    model = model_config_from_hf(folder)
    written = hf_config_from_model(model, torch.bfloat16, {"eos_token_id": 5})
    (folder / "config.json").write_text(json.dumps(written))
    assert model_config_from_hf(folder) == model
    read = LlamaConfig.from_pretrained(folder)
    assert (read.bos_token_id, read.eos_token_id, read.dtype) == (None, 5, torch.bfloat16)
    assert read.rope_parameters["rope_theta"] == 7.0
    assert read.rope_parameters["rope_type"] == "llama3"

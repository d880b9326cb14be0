"""Presets against their published sizes, and the filling of what was not given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from megatron_sip.checkpoint.hf_config import hf_config_from_model
from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.config.presets import parameter_count, presets, resolve_model, with_preset
from megatron_sip.config.validate import notes, validate
from megatron_sip.errors import ConfigError

# Published counts; llama-tiny and llama-9.6m at vocabulary 4096 and llama-1.4b at 32,000 are ours.
PUBLISHED = {
    "llama-tiny": 8_064_384,
    "llama-9.6m": 9_629_760,
    "smollm2-135m": 134_515_008,
    "llama-1.4b": 1_364_297_728,
    "llama3.2-1b": 1_235_814_400,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}
TOKENIZERS = {"llama-tiny": 4096, "llama-9.6m": 4096, "llama-1.4b": 32_000}


def _resolved(name: str) -> ModelConfig:
    return resolve_model(Config(model=ModelConfig(model_preset=name)), TOKENIZERS.get(name, 50_000)).model


def test_every_preset_is_in_the_table() -> None:
    assert set(PUBLISHED) == set(presets())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert parameter_count(_resolved(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_closed_form_counts_what_transformers_builds(name: str) -> None:
    model = _resolved(name)
    hf = transformers.LlamaConfig(**hf_config_from_model(model, torch.float32))
    with torch.device("meta"):
        built = transformers.LlamaForCausalLM(hf)
    built.tie_weights()
    assert parameter_count(model) == sum(parameter.numel() for parameter in built.parameters())


def test_head_width_of_its_own_is_counted() -> None:
    model = replace(_resolved("llama-tiny"), kv_channels=64)
    assert parameter_count(model) - PUBLISHED["llama-tiny"] == 4 * 2 * 384 * (64 - 48) * (8 + 4)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_presets_validate_at_every_layout_that_their_layers_allow(name: str, tp: int, pp: int) -> None:
    config = _runnable(_resolved(name), tp, pp)
    validate(config, tp * pp)


def _runnable(model: ModelConfig, tp: int, pp: int) -> Config:
    config = Config(model=model)
    parallel = replace(
        config.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, pad_query_groups=True
    )
    data = replace(config.data, data_path=("corpus",), tokenizer_model="tokenizer")
    judge = replace(config.judge, judge_url=("http://127.0.0.1:8100/v1",))
    return replace(config, parallel=parallel, data=data, judge=judge)


def test_padded_query_groups_are_told() -> None:
    smollm = _resolved("smollm2-135m")
    assert notes(_runnable(smollm, 1, 1)) == ()
    (note,) = notes(_runnable(smollm, 2, 1))
    assert "--num-query-groups 3" in note
    assert "1.33 times" in note


def test_padding_query_groups_must_be_asked_for() -> None:
    config = _runnable(_resolved("smollm2-135m"), 2, 1)
    with pytest.raises(ConfigError, match=r"--tensor-model-parallel-size 2 .* use 1 or 3, or .*--pad-query-groups"):
        validate(replace(config, parallel=replace(config.parallel, pad_query_groups=False)), 2)


def test_given_values_win_over_the_preset() -> None:
    model = with_preset(ModelConfig(model_preset="llama3-8b", num_layers=2, untie_embeddings_and_output_weights=False))
    assert (model.num_layers, model.untie_embeddings_and_output_weights) == (2, False)
    assert (model.hidden_size, model.rotary_base, model.kv_channels) == (4096, 500000.0, 128)


def test_vocabulary_given_then_preset_then_tokenizer() -> None:
    def vocabulary(model: ModelConfig) -> int | None:
        return resolve_model(Config(model=model), 5000).model.vocab_size

    assert vocabulary(ModelConfig(model_preset="llama3-8b", vocab_size=7)) == 7
    assert vocabulary(ModelConfig(model_preset="llama3-8b")) == 128256
    assert vocabulary(ModelConfig(model_preset="llama-tiny")) == 5000


def test_only_llama32_scales_its_rope() -> None:
    scaled = {name: model.rope_scaling_factor for name, model in presets().items() if model.rope_scaling_factor}
    assert scaled == {"llama3.2-1b": 32.0}


def test_missing_sizes_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_model(Config(model=ModelConfig(num_layers=2, hidden_size=64)), 100)
    message = str(caught.value)
    assert "--ffn-hidden-size, --num-attention-heads, --num-query-groups" in message
    assert "--num-layers" not in message
    assert "--vocab-size" not in message
    assert "--model-preset" in message


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--model-preset llama3-8 is unknown; did you mean llama3-8b\?"):
        with_preset(ModelConfig(model_preset="llama3-8"))


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"--num-attention-heads 7 does not divide --hidden-size 384"):
        with_preset(ModelConfig(model_preset="llama-tiny", num_attention_heads=7))

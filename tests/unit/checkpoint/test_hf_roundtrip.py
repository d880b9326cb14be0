"""Hugging Face -> policy parameters at some TP -> Hugging Face, bit for bit; and the layout against the formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf_toys import KINDS, empty_stage, padded, toy_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_sip.checkpoint.hf import export_hf, load_hf_weights
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.checkpoint.hf_names import llama_shape, slot_of, slots
from megatron_sip.checkpoint.hf_tensors import all_hf_shapes, iter_hf_tensors, join, zero_padded_groups
from megatron_sip.errors import CheckpointError


def load_all_ranks(folder, tp_size, *, fused=False, dtype=torch.float32):
    model = model_config_from_hf(folder)
    shape = padded(llama_shape(model), tp_size)
    ranks = []
    for tp_rank in range(tp_size):
        stage = empty_stage(shape, tp_size, fused=fused, dtype=dtype)
        load_hf_weights(folder, stage, model, tp_rank=tp_rank, tp_size=tp_size)
        assert not any(tensor.isnan().any() for tensor in stage.values())
        ranks.append({slot_of(name).mcore: tensor for name, tensor in stage.items()})
    return shape, ranks


def hf_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if "inv_freq" not in name}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_is_bitwise_the_same(kind, tp_size, tmp_path):
    original = toy_llama(tmp_path / "hf", **KINDS[kind])
    shape, ranks = load_all_ranks(tmp_path / "hf", tp_size)
    assert shape.groups_padded % tp_size == 0

    def full(name):
        return join(slot_of(name).entry.kind, [rank[name] for rank in ranks])

    back = dict(iter_hf_tensors(full, shape))
    assert list(back) == list(all_hf_shapes(shape))
    expected = hf_state(original)
    if shape.tied:
        del expected["lm_head.weight"]
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(back[name], tensor), name


def test_fused_norm_names_carry_the_same_tensors(tmp_path):
    toy_llama(tmp_path / "hf")
    _, local = load_all_ranks(tmp_path / "hf", 2)
    _, fused = load_all_ranks(tmp_path / "hf", 2, fused=True)
    for rank, other in zip(local, fused, strict=True):
        assert rank.keys() == other.keys()
        assert all(torch.equal(rank[name], other[name]) for name in rank)


def test_qkv_rows_are_grouped_as_megatron_splits_them(tmp_path):
    """TP rank 1 of 2 holds group 1: q heads 2 and 3, then k head 1, then v head 1 (4 heads, 2 groups of width 8)."""
    original = toy_llama(tmp_path / "hf")
    _, ranks = load_all_ranks(tmp_path / "hf", 2)
    attention = original.model.layers[1].self_attn
    q, k, v = (getattr(attention, f"{name}_proj").weight for name in "qkv")
    expected = torch.cat([q[16:32], k[8:16], v[8:16]])
    assert torch.equal(ranks[1]["decoder.layers.1.self_attention.linear_qkv.weight"], expected)
    gate, up = original.model.layers[1].mlp.gate_proj.weight, original.model.layers[1].mlp.up_proj.weight
    assert torch.equal(ranks[1]["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate[24:], up[24:]]))
    columns = ranks[1]["decoder.layers.1.self_attention.linear_proj.weight"]
    assert torch.equal(columns, attention.o_proj.weight[:, 16:32])


def test_padding_is_zero_and_only_where_it_belongs(tmp_path):
    """3 groups of 3 heads of width 4 at TP 2 become 4 groups; the last one, on rank 1, is zero."""
    toy_llama(tmp_path / "hf", **KINDS["odd_groups_tied"])
    shape, ranks = load_all_ranks(tmp_path / "hf", 2)
    assert (shape.groups_padded, shape.vocab_padded) == (4, 112)
    qkv = torch.cat([rank["decoder.layers.0.self_attention.linear_qkv.weight"] for rank in ranks])
    proj = torch.cat([rank["decoder.layers.0.self_attention.linear_proj.weight"] for rank in ranks], dim=1)
    rows = torch.cat([rank["embedding.word_embeddings.weight"] for rank in ranks])
    assert qkv.shape == (4 * 5 * 4, 36)
    assert not qkv[60:].any()
    assert qkv[:60].all(dim=1).all()
    assert not proj[:, 36:].any()
    assert proj[:, :36].any(dim=0).all()
    assert not rows[101:].any()


def test_stages_and_a_tied_output_layer_on_the_last_one(tmp_path):
    original = toy_llama(tmp_path / "hf", **KINDS["mha_tied"])
    model = model_config_from_hf(tmp_path / "hf")
    shape = padded(llama_shape(model), 1)
    last = empty_stage(shape, 1, range(1, 3))
    assert "output_layer.weight" in last
    load_hf_weights(tmp_path / "hf", last, model, first_layer=1)
    assert torch.equal(last["output_layer.weight"][:101], original.model.embed_tokens.weight)
    assert torch.equal(last["decoder.layers.1.mlp.linear_fc2.weight"], original.model.layers[2].mlp.down_proj.weight)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain_rope", "llama3_rope"])
def test_exported_folder_loads_in_transformers_with_the_same_logits(scaled, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
        rope["original_max_position_embeddings"] = 16
    original = toy_llama(tmp_path / "hf", head_dim=12, rope_parameters=rope)
    model = model_config_from_hf(tmp_path / "hf")
    stage = empty_stage(padded(llama_shape(model), 1), 1)
    load_hf_weights(tmp_path / "hf", stage, model)
    export_hf(tmp_path / "out", stage, model, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    tokens = torch.arange(2 * 40).reshape(2, 40) % 101
    with torch.no_grad():
        assert torch.equal(original(tokens).logits, again(tokens).logits)
    assert model_config_from_hf(tmp_path / "out") == model


def test_bf16_stays_bf16_and_the_name_of_the_type_is_written(tmp_path):
    original = toy_llama(tmp_path / "hf", dtype=torch.bfloat16)
    model = model_config_from_hf(tmp_path / "hf")
    stage = empty_stage(padded(llama_shape(model), 1), 1, dtype=torch.bfloat16)
    load_hf_weights(tmp_path / "hf", stage, model)
    export_hf(tmp_path / "out", stage, model)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in hf_state(original).items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert again.dtype == torch.bfloat16
    stage["decoder.final_layernorm.weight"] = stage["decoder.final_layernorm.weight"].float()
    with pytest.raises(CheckpointError, match=r"several types.*torch\.bfloat16.*torch\.float32"):
        export_hf(tmp_path / "mixed", stage, model)
    assert not (tmp_path / "mixed").exists()


def test_export_refuses_padding_that_is_not_zero_until_it_is_zeroed(tmp_path):
    toy_llama(tmp_path / "hf", **KINDS["odd_groups_tied"])
    model = model_config_from_hf(tmp_path / "hf")
    shape = padded(llama_shape(model), 2)
    stage = empty_stage(shape, 1)
    load_hf_weights(tmp_path / "hf", stage, model)
    before = {name: tensor.clone() for name, tensor in stage.items()}
    for name in ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"):
        stage[f"decoder.layers.1.{name}"][-1, -1] = 1e-30
        with pytest.raises(CheckpointError, match=rf"layers\.1\.{name}.*are not zero"):
            export_hf(tmp_path / "out", stage, model)
        assert not list(tmp_path.glob("*out*"))
        zero_padded_groups(stage, shape, tp_rank=0, tp_size=1)
    # The last qkv row belongs to the padding as a whole, the last output row only in its padded columns.
    assert all(torch.equal(stage[name], tensor) for name, tensor in before.items())
    export_hf(tmp_path / "out", stage, model)


def test_load_refuses_before_it_fills_anything(tmp_path):
    toy_llama(tmp_path / "hf")
    model = model_config_from_hf(tmp_path / "hf")
    shape = padded(llama_shape(model), 1)

    def refused(stage, match, **arguments):
        with pytest.raises(CheckpointError, match=match):
            load_hf_weights(tmp_path / "hf", stage, arguments.pop("model", model), **arguments)
        assert all(tensor.isnan().all() for tensor in stage.values())

    refused(empty_stage(shape, 1), "--num-layers is 4, config.json says 3", model=replace(model, num_layers=4))
    refused(empty_stage(shape, 1), "--rotary-base is 2.0", model=replace(model, rotary_base=2.0))
    refused(empty_stage(shape, 1), r"layer 3, but --num-layers is 3", first_layer=1)
    refused(empty_stage(shape, 1) | {"output_layer.bias": torch.full((1,), float("nan"))}, "output_layer.bias has no")
    lacking = empty_stage(shape, 1)
    del lacking["decoder.layers.1.mlp.linear_fc2.weight"]
    refused(lacking, r"lacks decoder\.layers\.1\.mlp\.linear_fc2\.weight")
    twice = empty_stage(shape, 1)
    twice["decoder.layers.0.mlp.linear_fc1.layer_norm_weight"] = twice["decoder.layers.0.pre_mlp_layernorm.weight"]
    refused(twice, "twice")
    misshapen = empty_stage(shape, 1)
    misshapen["decoder.layers.0.mlp.linear_fc2.weight"] = torch.full((32, 40), float("nan"))
    refused(misshapen, r"linear_fc2.weight has shape \(32, 40\) on this rank, expected \(32, 48\)")
    refused(empty_stage(shape, 1), "5 does not divide", tp_size=5)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    def refused(match, change, **kind):
        toy_llama(tmp_path / "hf", **kind)
        file = tmp_path / "hf" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        model = model_config_from_hf(tmp_path / "hf")
        with pytest.raises(CheckpointError, match=match):
            load_hf_weights(tmp_path / "hf", empty_stage(padded(llama_shape(model), 1), 1), model)

    refused("no tensor model.norm.weight", lambda t: t.pop("model.norm.weight"))
    key = "model.layers.0.self_attn.k_proj.weight"
    refused(r"k_proj.weight has shape \(16, 16\)", lambda t: t.update({key: t[key][:, :16].clone()}))
    refused("type F64", lambda t: t.update({key: t[key].double()}))
    bias = "model.layers.0.self_attn.q_proj.bias"
    refused(f"has the tensor {bias}", lambda t: t.update({bias: torch.zeros(32)}))
    head = {"lm_head.weight": torch.ones(101, 32)}
    refused("differs from the embedding", lambda t: t.update(head), tie_word_embeddings=True)


def test_old_rotary_buffers_and_a_repeated_tied_head_are_let_pass(tmp_path):
    original = toy_llama(tmp_path / "hf", tie_word_embeddings=True)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    shape, (rank,) = load_all_ranks(tmp_path / "hf", 1)
    assert set(rank) == {slot.mcore for slot in slots(shape)}
    assert torch.equal(rank["decoder.final_layernorm.weight"], original.model.norm.weight)

"""Small random Hugging Face Llamas, and the parameters of a policy that would take their weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sip.checkpoint.hf_names import OUTPUT, TABLE, LlamaShape, padded_query_groups
from megatron_sip.checkpoint.hf_tensors import rank_shape

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "mha_tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "odd_groups_tied": {
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "wide_heads": {"head_dim": 12},
}


def toy_llama(folder: Path | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """A random model whose every weight (norms too) is its own; saved to `folder` if one is given."""
    from transformers import LlamaConfig, LlamaForCausalLM  # late: spawned ranks need the shapes only

    sizes = {
        "vocab_size": 101,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.1, std=0.3)
    model = model.to(dtype).eval()
    if folder is not None:
        model.save_pretrained(folder)
    return model


def padded(shape: LlamaShape, tp_size: int) -> LlamaShape:
    """The shape of a policy at this tensor parallel size."""
    rows = -(-shape.vocab_size // (8 * tp_size)) * 8 * tp_size
    return shape.with_padding(padded_query_groups(shape.num_query_groups, tp_size), rows)


def empty_stage(
    shape: LlamaShape,
    tp_size: int,
    layers: range | None = None,
    *,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Parameters of one rank of the stage with these layers, every value NaN until it is filled."""
    layers = range(shape.num_layers) if layers is None else layers
    last = layers.stop == shape.num_layers
    stage = {}
    for entry in TABLE:
        if entry.in_layer:
            template = entry.fused if fused and entry.fused else entry.mcore
            names = [template.format(layer=local) for local in range(len(layers))]
        elif entry.mcore.startswith("embedding"):
            names = [entry.mcore] if layers.start == 0 else []
        elif entry is OUTPUT:
            names = [entry.mcore] if last and not (shape.tied and layers.start == 0) else []
        else:
            names = [entry.mcore] if last else []
        stage |= {name: torch.full(rank_shape(entry.kind, shape, tp_size), float("nan"), dtype=dtype) for name in names}
    return stage

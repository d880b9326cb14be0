"""Which tensors of the model one pipeline stage holds, and how far its policy pads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_sip.checkpoint.hf_names import TABLE, Kind, LlamaShape, Slot, llama_shape, slot_of
from megatron_sip.checkpoint.hf_tensors import check_divisible, rank_shape
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError


def stage_slots(names: Iterable[str], shape: LlamaShape, first_layer: int) -> dict[str, Slot]:
    """The slot of each parameter of a stage whose layer 0 is the model's layer `first_layer`.

    Raises:
        CheckpointError: an unknown parameter, one that is there twice, an incomplete layer, or a layer too many.
    """
    named = {name: slot_of(name, first_layer) for name in names}
    found = set(named.values())
    if len(found) != len(named):
        raise CheckpointError("the stage names a parameter twice, in the local and in the fused spelling")
    layers = {slot.layer for slot in found if slot.layer is not None}
    missing = {Slot(entry, layer) for layer in layers for entry in TABLE if entry.in_layer} - found
    if missing:
        raise CheckpointError(f"the stage lacks {min(slot.mcore for slot in missing)}")
    if layers and max(layers) >= shape.num_layers:
        raise CheckpointError(f"the stage has layer {max(layers)}, but --num-layers is {shape.num_layers}")
    return named


def policy_shape(sizes: Mapping[Slot, tuple[int, ...]], model: ModelConfig, tp_size: int) -> LlamaShape:
    """The model's shape with the padding that the parameters of one tensor parallel rank show.

    Raises:
        CheckpointError: a parameter whose shape belongs to another model.
    """
    shape = llama_shape(model)
    group_rows = (shape.heads_per_group + 2) * shape.kv_channels
    groups = [size[0] * tp_size // group_rows for slot, size in sizes.items() if slot.entry.kind is Kind.QKV]
    rows = [size[0] * tp_size for slot, size in sizes.items() if slot.entry.kind is Kind.VOCAB]
    # A stage without layers or without embedding shows no padding and needs none.
    shape = shape.with_padding(
        groups[0] if groups else -(-shape.num_query_groups // tp_size) * tp_size,
        rows[0] if rows else -(-shape.vocab_size // tp_size) * tp_size,
    )
    check_divisible(shape, tp_size)
    for slot, size in sizes.items():
        expected = rank_shape(slot.entry.kind, shape, tp_size)
        if size != expected:
            raise CheckpointError(f"the parameter {slot.mcore} has shape {size} on this rank, expected {expected}")
    return shape

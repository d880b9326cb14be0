"""Cutting, fusing and padding between Hugging Face Llama tensors and megatron-core's, as pure functions.

Padding: a policy may have more query groups and vocabulary rows than the model (see `LlamaShape`). The rows
of a padded group's q, k and v and the columns of the output projection that read it are zero. Its attention
output is then zero, so the function is unchanged; v = 0 makes the gradient of those columns zero, the columns
make the gradient of v zero, and both make the gradients of q and k zero: it stays zero under training, weight
decay included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_sip.checkpoint.hf_names import Kind, LlamaShape, Slot, slot_of, slots
from megatron_sip.errors import CheckpointError


class Sliceable(Protocol):
    """A tensor, or a slice view of one that is still on disk."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The part that `index` names, by rows, or by rows and columns."""
        ...


def hf_shapes(slot: Slot, shape: LlamaShape) -> tuple[tuple[int, ...], ...]:
    """Shapes of the slot's Hugging Face tensors."""
    hidden, ffn, d = shape.hidden_size, shape.ffn_hidden_size, shape.kv_channels
    q, kv = shape.num_attention_heads * d, shape.num_query_groups * d
    return {
        Kind.NORM: ((hidden,),),
        Kind.VOCAB: ((shape.vocab_size, hidden),),
        Kind.QKV: ((q, hidden), (kv, hidden), (kv, hidden)),
        Kind.PROJ: ((hidden, q),),
        Kind.GATE_UP: ((ffn, hidden), (ffn, hidden)),
        Kind.DOWN: ((hidden, ffn),),
    }[slot.entry.kind]


def all_hf_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model with its shape, in the order of the forward pass."""
    named = ((slot.hf(shape.tied), hf_shapes(slot, shape)) for slot in slots(shape))
    return {name: size for names, sizes in named for name, size in zip(names, sizes, strict=True)}


def check_divisible(shape: LlamaShape, tp_size: int) -> None:
    """Refuse a tensor parallel size that does not divide what it cuts.

    Raises:
        CheckpointError: naming the size and the flag.
    """
    for flag, value in (
        ("query groups (with padding; --num-query-groups)", shape.groups_padded),
        ("rows of the padded vocabulary (--make-vocab-size-divisible-by)", shape.vocab_padded),
        ("--ffn-hidden-size", shape.ffn_hidden_size),
    ):
        if value % tp_size:
            raise CheckpointError(f"--tensor-model-parallel-size {tp_size} does not divide {value} {flag}")


def rank_shape(kind: Kind, shape: LlamaShape, tp_size: int) -> tuple[int, ...]:
    """Shape of a parameter of this kind on one tensor parallel rank."""
    hidden, d, groups = shape.hidden_size, shape.kv_channels, shape.groups_padded // tp_size
    return {
        Kind.NORM: (hidden,),
        Kind.VOCAB: (shape.vocab_padded // tp_size, hidden),
        Kind.QKV: (groups * (shape.heads_per_group + 2) * d, hidden),
        Kind.PROJ: (hidden, groups * shape.heads_per_group * d),
        Kind.GATE_UP: (2 * shape.ffn_hidden_size // tp_size, hidden),
        Kind.DOWN: (hidden, shape.ffn_hidden_size // tp_size),
    }[kind]


def _part(total: int, real: int, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
    """This rank's part of `total` things of which the first `real` exist: start, stop (both real), number padded."""
    each = total // tp_size
    start, stop = min(tp_rank * each, real), min((tp_rank + 1) * each, real)
    return start, stop, each - (stop - start)


def _pad(tensor: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    """Append `count` zero rows (dim 0) or columns (dim 1)."""
    if count == 0:
        return tensor
    size = list(tensor.shape)
    size[dim] = count
    return torch.cat([tensor, tensor.new_zeros(size)], dim=dim)


def pack(
    kind: Kind, sources: Sequence[Sliceable], shape: LlamaShape, tp_rank: int = 0, tp_size: int = 1
) -> torch.Tensor:
    """What tensor parallel rank `tp_rank` holds, read from the Hugging Face tensors; only that part is read.

    sources  the slot's Hugging Face tensors in the table's order, for instance q, k, v
    returns  `rank_shape(kind, shape, tp_size)`, in the dtype of the sources
    """
    first = sources[0]
    if kind is Kind.NORM:
        return first[:]
    if kind is Kind.VOCAB:
        start, stop, padded = _part(shape.vocab_padded, shape.vocab_size, tp_rank, tp_size)
        return _pad(first[start:stop], 0, padded)
    if kind in (Kind.GATE_UP, Kind.DOWN):
        start, stop, _ = _part(shape.ffn_hidden_size, shape.ffn_hidden_size, tp_rank, tp_size)
        if kind is Kind.DOWN:
            return first[:, start:stop]
        return torch.cat([source[start:stop] for source in sources])
    start, stop, padded = _part(shape.groups_padded, shape.num_query_groups, tp_rank, tp_size)
    d, q_width = shape.kv_channels, shape.heads_per_group * shape.kv_channels
    if kind is Kind.PROJ:
        return _pad(first[:, start * q_width : stop * q_width], 1, padded * q_width)
    parts = [
        source[start * width : stop * width].reshape(stop - start, width, shape.hidden_size)
        for source, width in zip(sources, (q_width, d, d), strict=True)
    ]
    fused = torch.cat(parts, dim=1).reshape(-1, shape.hidden_size)
    return _pad(fused, 0, padded * (q_width + 2 * d))


def join(kind: Kind, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor parallel ranks' parts, in rank order, as the one tensor that a single rank would hold."""
    if kind is Kind.NORM or len(shards) == 1:
        return shards[0]
    if kind is Kind.GATE_UP:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(list(shards), dim=1 if kind in (Kind.PROJ, Kind.DOWN) else 0)


def unpack(slot: Slot, full: torch.Tensor, shape: LlamaShape) -> tuple[torch.Tensor, ...]:
    """The slot's Hugging Face tensors out of the joined one; the padding is dropped.

    Padded vocabulary rows may hold anything (their logits are masked). Padded groups must be zero, because
    a model without them would compute something else.

    Raises:
        CheckpointError: a padded group is not zero, or the tensor has another shape.
    """
    kind = slot.entry.kind
    if tuple(full.shape) != rank_shape(kind, shape, 1):
        raise CheckpointError(f"{slot.mcore} has shape {tuple(full.shape)}, expected {rank_shape(kind, shape, 1)}")
    if kind is Kind.VOCAB:
        return (full[: shape.vocab_size],)
    if kind is Kind.GATE_UP:
        gate, up = full.chunk(2)
        return gate, up
    if kind not in (Kind.QKV, Kind.PROJ):
        return (full,)
    _require_zero_padding(slot, full, shape)
    d, q_width = shape.kv_channels, shape.heads_per_group * shape.kv_channels
    if kind is Kind.PROJ:
        return (full[:, : shape.num_query_groups * q_width],)
    groups = full.view(shape.groups_padded, q_width + 2 * d, shape.hidden_size)[: shape.num_query_groups]
    q, k, v = groups.split([q_width, d, d], dim=1)
    return tuple(part.reshape(-1, shape.hidden_size) for part in (q, k, v))


def padding_of(kind: Kind, local: torch.Tensor, shape: LlamaShape, tp_rank: int = 0, tp_size: int = 1) -> torch.Tensor:
    """A view of the padded groups' part of a rank's QKV or output projection weight; empty where it has none."""
    _, _, padded = _part(shape.groups_padded, shape.num_query_groups, tp_rank, tp_size)
    q_width = shape.heads_per_group * shape.kv_channels
    if kind is Kind.PROJ:
        return local[:, local.shape[1] - padded * q_width :]
    if kind is Kind.QKV:
        return local[local.shape[0] - padded * (q_width + 2 * shape.kv_channels) :]
    return local[:0]


def _require_zero_padding(slot: Slot, full: torch.Tensor, shape: LlamaShape) -> None:
    if padding_of(slot.entry.kind, full, shape).count_nonzero():
        raise CheckpointError(
            f"{slot.mcore}: the query groups that only pad {shape.num_query_groups} to {shape.groups_padded} for "
            f"tensor parallelism are not zero, so a model without them would differ; train with a "
            f"--tensor-model-parallel-size that divides --num-query-groups, or start with zeroed padding"
        )


def zero_padded_groups(
    named_parameters: Mapping[str, torch.Tensor], shape: LlamaShape, *, tp_rank: int, tp_size: int
) -> None:
    """Make the padded groups of a freshly initialised stage zero, in place, so that it can be exported later."""
    with torch.no_grad():
        for name, parameter in named_parameters.items():
            padding_of(slot_of(name).entry.kind, parameter, shape, tp_rank, tp_size).zero_()


def iter_hf_tensors(
    full_tensor: Callable[[str], torch.Tensor], shape: LlamaShape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face tensor, one after the other, in the order of `all_hf_shapes`.

    full_tensor  gives the joined tensor of a global megatron-core name (local spec spelling)
    """
    for slot in slots(shape):
        yield from zip(slot.hf(shape.tied), unpack(slot, full_tensor(slot.mcore), shape), strict=True)

"""One table of names between megatron-core's GPTModel and Hugging Face Llama, for both directions and both specs.

What a tensor looks like on each side, and how it is cut and padded, is in `hf_tensors.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError


class Kind(Enum):
    """How a tensor is laid out and how tensor parallelism cuts it."""

    NORM = "norm"
    """[hidden], the same on every rank."""
    VOCAB = "vocab"
    """[padded vocabulary, hidden], cut by rows."""
    QKV = "qkv"
    """[groups * (heads per group + 2) * head_dim, hidden]: for each group its q heads, its k, its v; cut by rows."""
    PROJ = "proj"
    """[hidden, heads * head_dim], cut by columns."""
    GATE_UP = "gate_up"
    """[2 * ffn, hidden], all gate rows, then all up rows; each half is cut by rows."""
    DOWN = "down"
    """[hidden, ffn], cut by columns."""


@dataclass(frozen=True)
class Entry:
    """One row of the table; `{layer}` stands for the layer number.

    `fused` is the name that Transformer Engine's layers use where it differs from `mcore`.
    """

    kind: Kind
    mcore: str
    hf: tuple[str, ...]
    fused: str | None = None

    @property
    def in_layer(self) -> bool:
        """Whether each layer has one of it."""
        return "{layer}" in self.mcore

    @property
    def stored(self) -> str:
        """Name in a distributed checkpoint, the same for both specs: there the layers are an axis of the tensor."""
        return (self.fused or self.mcore).replace("{layer}.", "")

    @property
    def spellings(self) -> tuple[str, ...]:
        """Names by which a distributed checkpoint may store it."""
        return tuple(dict.fromkeys((self.stored, self.mcore.replace("{layer}.", ""))))


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

EMBEDDING = Entry(Kind.VOCAB, "embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
OUTPUT = Entry(Kind.VOCAB, "output_layer.weight", ("lm_head.weight",))

TABLE: tuple[Entry, ...] = (
    EMBEDDING,
    Entry(
        Kind.NORM,
        _LAYER + "input_layernorm.weight",
        (_HF_LAYER + "input_layernorm.weight",),
        fused=_LAYER + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Entry(
        Kind.QKV,
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF_LAYER + f"self_attn.{name}_proj.weight" for name in "qkv"),
    ),
    Entry(Kind.PROJ, _LAYER + "self_attention.linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",)),
    Entry(
        Kind.NORM,
        _LAYER + "pre_mlp_layernorm.weight",
        (_HF_LAYER + "post_attention_layernorm.weight",),
        fused=_LAYER + "mlp.linear_fc1.layer_norm_weight",
    ),
    Entry(
        Kind.GATE_UP,
        _LAYER + "mlp.linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
    ),
    Entry(Kind.DOWN, _LAYER + "mlp.linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",)),
    Entry(Kind.NORM, "decoder.final_layernorm.weight", ("model.norm.weight",)),
    OUTPUT,
)

_BY_MCORE_NAME = {name: entry for entry in TABLE for name in (entry.mcore, entry.fused) if name is not None}
_LAYER_NUMBER = re.compile(r"^decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Slot:
    """One tensor of one model: a row of the table and, inside a layer, the layer's global number."""

    entry: Entry
    layer: int | None = None

    @property
    def mcore(self) -> str:
        """Global name on megatron-core's side (the local spec's spelling)."""
        return self.entry.mcore.format(layer=self.layer)

    def hf(self, tied: bool) -> tuple[str, ...]:
        """Names on the Hugging Face side; with tied embeddings the output layer is the embedding."""
        names = EMBEDDING.hf if tied and self.entry is OUTPUT else self.entry.hf
        return tuple(name.format(layer=self.layer) for name in names)


def slot_of(name: str, first_layer: int = 0) -> Slot:
    """The slot of a parameter of one stage whose layer 0 is the model's layer `first_layer`.

    Raises:
        CheckpointError: the table has no such parameter.
    """
    number = _LAYER_NUMBER.match(name)
    entry = _BY_MCORE_NAME.get(_LAYER_NUMBER.sub(_LAYER, name))
    if entry is None:
        raise CheckpointError(f"the model's parameter {name} has no counterpart in a Hugging Face Llama")
    return Slot(entry, first_layer + int(number.group(1)) if number else None)


@dataclass(frozen=True)
class LlamaShape:
    """The sizes that the map needs.

    `num_query_groups` and `vocab_size` are the Hugging Face model's. The policy may have more of both:
    `groups_padded` so that tensor parallelism divides the groups, `vocab_padded` so that it divides the rows.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied: bool
    groups_padded: int
    vocab_padded: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_attention_heads // self.num_query_groups

    def with_padding(self, groups_padded: int, vocab_padded: int) -> LlamaShape:
        """The same model in a policy with so many groups and vocabulary rows."""
        if groups_padded < self.num_query_groups or vocab_padded < self.vocab_size:
            raise CheckpointError(
                f"the policy has {groups_padded} query groups and {vocab_padded} vocabulary rows, fewer than the "
                f"model's {self.num_query_groups} (--num-query-groups) and {self.vocab_size} (--vocab-size)"
            )
        return replace(self, groups_padded=groups_padded, vocab_padded=vocab_padded)


def llama_shape(model: ModelConfig) -> LlamaShape:
    """The unpadded shape of a resolved model.

    Raises:
        CheckpointError: a size is missing, or the query groups do not divide the heads.
    """

    def size(name: str) -> Any:
        value = getattr(model, name)
        if value is None:
            raise CheckpointError(f"--{name.replace('_', '-')} is not set, and a Hugging Face Llama needs it")
        return value

    heads, groups = size("num_attention_heads"), size("num_query_groups")
    if heads % groups:
        raise CheckpointError(f"--num-query-groups {groups} does not divide --num-attention-heads {heads}")
    head_dim = model.kv_channels if model.kv_channels is not None else size("hidden_size") // heads
    return LlamaShape(
        num_layers=size("num_layers"),
        hidden_size=size("hidden_size"),
        ffn_hidden_size=size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head_dim,
        vocab_size=size("vocab_size"),
        tied=not size("untie_embeddings_and_output_weights"),
        groups_padded=groups,
        vocab_padded=size("vocab_size"),
    )


def padded_query_groups(num_query_groups: int, tp_size: int) -> int:
    """Smallest number of query groups that `tp_size` divides (ours; the added groups are zero)."""
    return -(-num_query_groups // tp_size) * tp_size


def padded_vocab_size(vocab_size: int, divisible_by: int, tp_size: int) -> int:
    """Smallest multiple of `divisible_by * tp_size` that holds the vocabulary (as in Megatron-LM)."""
    unit = divisible_by * tp_size
    return -(-vocab_size // unit) * unit


def slots(shape: LlamaShape) -> Iterator[Slot]:
    """Every tensor of the model, in the order of the forward pass; a tied output layer is none of its own."""
    layered = [entry for entry in TABLE if entry.in_layer]
    yield Slot(EMBEDDING)
    for layer in range(shape.num_layers):
        yield from (Slot(entry, layer) for entry in layered)
    for entry in TABLE:
        if not entry.in_layer and entry is not EMBEDDING and not (shape.tied and entry is OUTPUT):
            yield Slot(entry)

"""A Hugging Face Llama folder, opened only if its weights are those that its config.json describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_sip.checkpoint.hf_names import EMBEDDING, OUTPUT, LlamaShape, Slot
from megatron_sip.checkpoint.hf_tensors import all_hf_shapes, hf_shapes
from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder
from megatron_sip.errors import CheckpointError


@contextmanager
def open_llama(folder: str | Path, shape: LlamaShape) -> Iterator[SafetensorsFolder]:
    """The folder's tensors, lazily, after all of them were checked.

    Raises:
        CheckpointError: a missing, surplus or misshapen tensor, or a type that is not read.
    """
    with SafetensorsFolder(folder) as source:
        source.require_shapes(all_hf_shapes(shape))
        _refuse_surplus(source, shape)
        yield source


def _refuse_surplus(source: SafetensorsFolder, shape: LlamaShape) -> None:
    """Refuse tensors that nothing would read; the first Llama exports also stored rotary frequencies."""
    surplus = {name for name in source.names - set(all_hf_shapes(shape)) if not name.endswith("rotary_emb.inv_freq")}
    head = OUTPUT.hf[0]
    if shape.tied and head in surplus:
        surplus.remove(head)
        (size,) = hf_shapes(Slot(EMBEDDING), shape)
        source.require_shapes({head: size})
        if not torch.equal(source.lazy(head)[:], source.lazy(EMBEDDING.hf[0])[:]):
            raise CheckpointError(
                f"{source.folder}: tie_word_embeddings is true, but {head} differs from the embedding"
            )
    if surplus:
        raise CheckpointError(f"{source.folder} has the tensor {min(surplus)}, which is no part of a Llama")

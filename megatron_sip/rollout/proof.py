"""What proves that a server has the weights of a folder: checksums of its tensors, and log-probabilities of a text.

The checksums are exact. They cover what vLLM keeps as it was loaded: norms and embeddings on every server. Linear
layers are left out: a CPU server repacks them, and a tensor parallel one cuts and fuses them. The log-probabilities
depend on every weight, but only up to the rounding of two implementations.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder

VOCABULARY_MULTIPLE = 64
"""vLLM pads the rows of embedding and LM head to a multiple of this, with zeros."""
TOLERANCE = 0.3
"""Nats for a token in the mean. Between two implementations in bfloat16 0.05 to 0.1 was seen."""
FLOAT32_TOLERANCE = 1e-3
MOVED = 1e-4
"""A change of the policy's own log-probabilities above this is one of its weights, and shows on the server too."""

_PLACE = re.compile(r"dp\d+:pp\d+:pcp\d+:tp(\d+):(.+)")
_EMPTY = hashlib.sha256().hexdigest()
_COMPARED = re.compile(r"(lm_head|.*embed_tokens|.*norm)\.weight")
_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class Probe:
    """A text with the policy's own log-probabilities of its tokens but the first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Weights:
    """What is pushed: a Hugging Face folder, the name that its weights get on the servers, and the policy's probe."""

    version: str
    folder: Path
    probe: Probe
    in_float32: bool


@dataclass(frozen=True)
class Seen:
    """What a server's checksums tell: how many tensors are the folder's, which are not, and the server's types."""

    same: int
    other: tuple[str, ...]
    dtypes: frozenset[torch.dtype]


@dataclass
class FolderChecksums:
    """The checksums that a server must show if it has loaded a folder; each is worked out once, for all servers."""

    folder: Path
    _known: dict[tuple[str, int, int, torch.dtype], str] = field(default_factory=dict)
    _alone: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, shown: Mapping[str, str]) -> Seen:
        """Compare with the answer of vLLM's /weight_checker: SHA-256 by `dp0:pp0:pcp0:tp0:model.norm.weight`.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        places = [(_PLACE.fullmatch(name), digest) for name, digest in shown.items()]
        found = [(int(match[1]), match[2], digest) for match, digest in places if match]
        tp_size = 1 + max((rank for rank, _, _ in found), default=0)
        same, other, dtypes = 0, [], set()
        # One server after the other: an embedding is large, and in two types and padded larger still.
        with self._alone, SafetensorsFolder(self.folder) as source:
            for rank, name, digest in found:
                if not _COMPARED.fullmatch(name) or digest == _EMPTY or name not in source.names:
                    continue
                dtype = self._matching(source, name, rank, tp_size, digest)
                if dtype is None:
                    other.append(name)
                else:
                    same += 1
                    dtypes.add(dtype)
        return Seen(same, tuple(sorted(set(other))), frozenset(dtypes))

    def _matching(
        self, source: SafetensorsFolder, name: str, tp_rank: int, tp_size: int, digest: str
    ) -> torch.dtype | None:
        """The type in which the folder's tensor has this checksum; its own type is tried first."""
        own = source.dtype(name)
        for dtype in (own, *(other for other in _DTYPES if other is not own)):
            key = name, tp_rank, tp_size, dtype
            if key not in self._known:
                self._known[key] = checksum(served_part(source.lazy(name)[:], tp_rank, tp_size), dtype)
            if self._known[key] == digest:
                return dtype
        return None


def tensor_name(place: str) -> str:
    """The tensor of a checksum, without the rank of the server that keeps it."""
    match = _PLACE.fullmatch(place)
    return match[2] if match else place


def served_part(tensor: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """What one tensor parallel rank of a server keeps: all of a norm, padded rows of embedding and LM head.

    tensor   [hidden], or [vocab, hidden]
    returns  [hidden], or [padded_vocab / tp_size, hidden]
    """
    if tensor.dim() == 1:
        return tensor
    missing = -len(tensor) % VOCABULARY_MULTIPLE
    padded = torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])]) if missing else tensor
    return padded.chunk(tp_size)[tp_rank]


def checksum(tensor: torch.Tensor, dtype: torch.dtype) -> str:
    """SHA-256 of a tensor's bytes in this type."""
    raw = tensor.to(dtype).contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def probe_fault(probe: Probe, served: tuple[float, ...], tolerance: float) -> str | None:
    """In words why a server's log-probabilities are not those of the policy; None where they are."""
    differences = [abs(mine - theirs) for mine, theirs in zip(probe.logprobs, served, strict=True)]
    mean = sum(differences) / len(differences)
    if mean <= tolerance:  # also refuses nan
        return None
    return (
        f"its log-probabilities of {len(served)} tokens differ from the policy's by {mean:.2g} in the mean, and "
        f"{tolerance:g} is allowed (--rollout-tolerance)"
    )


def stale_fault(before: Probe | None, served_before: tuple[float, ...], now: Probe, served: tuple[float, ...]) -> bool:
    """Whether the policy has moved on the same text and the server has not, to the last bit."""
    if before is None or before.tokens != now.tokens or served_before != served:
        return False
    return max(abs(new - old) for new, old in zip(now.logprobs, before.logprobs, strict=True)) > MOVED

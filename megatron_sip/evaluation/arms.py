"""The arms of a comparison: policies as Hugging Face folders, their greedy continuations and held-out losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_sip.errors import CheckpointError, ConfigError

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Arm:
    """A name and the folder of its weights."""

    name: str
    folder: Path


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Arms from NAME=FOLDER; the first is the base that the others are compared with.

    Raises:
        ConfigError: no such form, a name that stands twice, a folder without config.json, or fewer than two.
    """
    arms = []
    for text in texts:
        name, equals, folder = text.partition("=")
        if not name or not equals or not folder:
            raise ConfigError(f"--arm {text!r} is not of the form NAME=FOLDER")
        if not (Path(folder) / "config.json").is_file():
            raise ConfigError(
                f"--arm {text}: {folder} is no Hugging Face folder (no config.json); tools/checkpoint/convert.py "
                "makes one from a checkpoint"
            )
        arms.append(Arm(name, Path(folder)))
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ConfigError(f"--arm: the names {', '.join(names)} are not all different")
    if len(arms) < 2:
        raise ConfigError("--arm: give the base and at least one policy to compare with it")
    return arms


def load_policy(folder: Path, vocab_size: int) -> Any:
    """A causal LM in fp32 on the GPU where there is one; nothing is fetched.

    Raises:
        CheckpointError: it cannot be loaded, or has fewer rows than the tokenizer has tokens.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {reason[0][:300]}") from error
    if model.config.vocab_size < vocab_size:
        raise CheckpointError(
            f"{folder} has a vocabulary of {model.config.vocab_size}, --tokenizer-model has {vocab_size} tokens; "
            "name the tokenizer that the policy was trained with"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def write_greedily(
    model: Any,
    prefixes: Sequence[Sequence[int]],
    length: int,
    eod: int,
    *,
    vocab_size: int,
    batch_size: int,
    tick: Tick,
) -> list[list[int]]:
    """The most probable continuation of each prefix, `length` tokens without end-of-document.

    Ids from `vocab_size` (of the tokenizer) on have no text and are not written. Prefixes of one batch are padded on
    the left; `tick` hears how many prefixes were done.
    """
    order = sorted(range(len(prefixes)), key=lambda index: len(prefixes[index]))
    written: list[list[int]] = [[] for _ in prefixes]
    for batch in _chunks(order, batch_size):
        ids, mask = _left_padded([prefixes[index] for index in batch], eod)
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            suppress_tokens=[eod, *range(vocab_size, model.config.vocab_size)],
            eos_token_id=None,
            pad_token_id=eod,
        )
        for index, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            written[index] = row
        tick(len(batch))
    return written


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _left_padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask `[rows, longest]`."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask


@torch.inference_mode()
def nats_per_token(model: Any, windows: Iterable[Sequence[int]], *, batch_size: int, tick: Tick) -> float:
    """Mean negative log-likelihood of each window's tokens after its first; windows are of one length."""
    total, count = 0.0, 0
    rows = [list(window) for window in windows]
    for batch in _chunks(range(len(rows)), batch_size):
        ids = torch.tensor([rows[index] for index in batch], device=model.device)
        logits = model(ids).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        total += float(losses.double().sum())
        count += losses.numel()
        tick(len(batch))
    if count == 0:
        raise ValueError("no window to measure")
    return total / count

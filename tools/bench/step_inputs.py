"""What the arms of a step bench read: seeded cuts of random tokens, and a tokenizer that has words for them."""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_sip.types import Cut
from tools.bench.step_spec import Point

EOD = 0
"""End of document in the tokenizer made here; no cut holds it."""
_END = "<|endoftext|>"


def random_cuts(point: Point, vocab_size: int, step: int, seed: int) -> list[Cut]:
    """The cuts of one step, the same for every arm; each step has others."""
    numbers = np.random.default_rng([seed, step])
    length = point.prefix + point.suffix
    tokens = numbers.integers(EOD + 1, vocab_size, size=(point.batch, length), dtype=np.int64)
    first = step * point.batch
    return [
        Cut(first + row, first + row, point.prefix, line[: point.prefix], line[point.prefix :])
        for row, line in enumerate(tokens)
    ]


def picks(seed: int, sample_index: int, candidates: int) -> list[float]:
    """The instant judge's score of each candidate, in [0, 1); any of them can be the best or the worst."""
    return np.random.default_rng([seed, sample_index, 1]).random(candidates).tolist()


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of `vocab_size` tokens in a Hugging Face folder: all bytes, then words of lower-case letters.

    Raises:
        ValueError: the vocabulary has no room for all bytes and the end of document.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [_END, *alphabet]
    if vocab_size < len(words):
        raise ValueError(f"a vocabulary of {vocab_size} has no room for {len(words)} tokens; raise --vocab-size")
    merges: list[tuple[str, str]] = []
    starts: list[str] = list(string.ascii_lowercase)
    while len(words) < vocab_size:
        pairs = itertools.product(starts, string.ascii_lowercase)
        fresh = list(itertools.islice(pairs, vocab_size - len(words)))
        starts = ["".join(pair) for pair in fresh]
        words += starts
        merges += fresh
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

"""Small real tokenizers and corpora for the tests of the data package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron_sip.data.documents import Corpus
from megatron_sip.data.indexed import IndexedWriter
from megatron_sip.data.tokenizer import Tokenizer

EOS = "<|endoftext|>"
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and then it rests a while.",
    "Caf\u00e9 cr\u00e8me; na\u00efve fa\u00e7ade. \u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "Emoji: \U0001f600\U0001f680\U0001f44d\U0001f3fd!",
    "Numbers 1 2 3 and\n\nwhite  space\tof every kind.",
]


def byte_level_folder(folder: Path, vocab_size: int = 300) -> Path:
    """A byte-level BPE so small that characters of several bytes take several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _save(backend, folder, EOS)


def llama2_folder(folder: Path) -> Path:
    """A sentencepiece-style BPE as of Llama 2: space mark, byte fallback, a space put before every text."""
    letters = sorted({character for text in TEXTS[:1] for character in text.replace(" ", "\u2581")})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges: list[tuple[str, str]] = []
    for left, right in [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "\u2581")]:
        tokens.append(left + right)
        merges.append((left, right))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    return _save(backend, folder, "</s>")


def unigram_wordpiece_folder(folder: Path) -> Path:
    """A WordPiece tokenizer, whose decoder does not say which bytes a token stands for."""
    backend = Backend(models.WordPiece(vocab={"[UNK]": 0, "a": 1, "##b": 2, EOS: 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    backend.decoder = decoders.WordPiece()
    return _save(backend, folder, EOS)


def _save(backend: Backend, folder: Path, eos: str) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]], eod: int | None = 0, dtype: type = np.uint16) -> str:
    """Write documents of token ids, each followed by `eod` unless that is None; returns the prefix."""
    with IndexedWriter(str(prefix), np.dtype(dtype)) as writer:
        for document in documents:
            writer.add([*document, *([] if eod is None else [eod])])
    return str(prefix)


def ascii_documents(tokenizer: Tokenizer, lengths: Sequence[int]) -> list[list[int]]:
    """Documents of printable one-byte tokens; the first tokens spell the document's number."""
    letters = [tokenizer.encode(letter)[0] for letter in "abcdefghij"]
    return [[letters[(number + place) % 10] for place in range(length)] for number, length in enumerate(lengths)]


def corpus_of(folder: Path, tokenizer: Tokenizer, lengths: Sequence[int]) -> Corpus:
    """A corpus of ASCII documents with these lengths."""
    return Corpus([write_corpus(folder / "corpus", ascii_documents(tokenizer, lengths), tokenizer.eod)], tokenizer.eod)

"""A small corpus with its own tokenizer, made in a second: sentences of a small grammar, seeded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_sip.data.indexed import IndexedWriter

WHO = "the old doctor,a young sailor,my sister,the angry king,some stupid fool,the quiet teacher,a dirty liar".split(
    ","
)
DOES = "sees,hates,helps,kills,loves,paints,forgets,damns".split(",")
WHAT = "the red house,a broken boat,his best friend,an idiot,the long letter,a bloody knife,the warm bread".split(",")
WHEN = "today,in the morning,after the war,without a word,again and again".split(",")


def documents(count: int, sentences: int, seed: int) -> list[str]:
    """`count` documents of `sentences` sentences."""
    draw = random.Random(seed)
    return [
        " ".join(
            f"{draw.choice(WHO)} {draw.choice(DOES)} {draw.choice(WHAT)} {draw.choice(WHEN)}.".capitalize()
            for _ in range(sentences)
        )
        for _ in range(count)
    ]


def make_tokenizer(folder: Path, texts: list[str], vocab_size: int = 320) -> None:
    """A byte-level BPE in a Hugging Face folder with <|endoftext|> as end of document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_corpus(folder: Path, count: int = 60, sentences: int = 8, seed: int = 1) -> tuple[str, str]:
    """(data path, tokenizer folder) of a corpus under `folder`."""
    texts = documents(count, sentences, seed)
    make_tokenizer(folder / "tokenizer", texts)
    return write_corpus(folder, str(folder / "tokenizer"), texts), str(folder / "tokenizer")


def write_corpus(folder: Path, tokenizer_folder: str, texts: list[str]) -> str:
    """The data path of a corpus of `texts` under `folder`, in tokens of an existing tokenizer."""
    from megatron_sip.data.tokenizer import Tokenizer as PolicyTokenizer

    tokenizer = PolicyTokenizer(tokenizer_folder)
    prefix = str(folder / "corpus_text_document")
    writer = IndexedWriter(prefix, np.dtype(np.uint16))
    for text in texts:
        writer.add([*tokenizer.encode(text), tokenizer.eod])
    writer.close()
    return prefix

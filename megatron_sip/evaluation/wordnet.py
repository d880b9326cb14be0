"""Nouns of WordNet with definition and kind, from its file `data.noun` (format: wndb(5WN))."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import DataError

NOUN_FILE = "data.noun"
# Lexicographer file 03 holds the roots (entity, thing, group): nearly everything is a kind of them.
ROOTS = "03"
_WORD = re.compile(r"[a-z]+(?:[ -][a-z]+)*")


@dataclass(frozen=True)
class Noun:
    """One sense of a noun. `topic` is the lexicographer file, such as "05" for animals; `kind` its hypernym's word."""

    word: str
    definition: str
    kind: str
    topic: str
    kind_topic: str


def read_nouns(folder: Path, shortest: int = 5, longest: int = 40) -> list[Noun]:
    """Common nouns that have one kind and a definition of `shortest` to `longest` words; each word's first sense.

    Raises:
        DataError: the folder holds no such file, or the file is no WordNet database.
    """
    file = folder / NOUN_FILE
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"--wordnet {folder} holds no readable {NOUN_FILE} ({error.strerror}); name the folder of the database"
        ) from error
    try:
        nouns = parse_nouns(lines)
    except (ValueError, IndexError, KeyError) as error:
        raise DataError(f"{file} is no noun file of WordNet ({error!r}); name the folder of the database") from error
    usable = [noun for noun in nouns if shortest <= len(noun.definition.split()) <= longest]
    if not usable:
        raise DataError(f"{file} holds no noun with a usable definition; name the folder of the WordNet database")
    return usable


def parse_nouns(lines: Iterable[str]) -> list[Noun]:
    """The first sense in the file of each word in small letters whose synset has exactly one hypernym.

    A synset is `offset topic n w_cnt word lex_id ... p_cnt pointer offset pos source/target ... | gloss`, w_cnt in
    hexadecimal; the pointer of a hypernym is `@`. The gloss is the definition, then examples in quotes.
    """
    synsets: dict[str, tuple[str, str, list[str], str]] = {}
    for line in lines:
        if not line or line.startswith(" "):
            continue  # the licence
        data, _, gloss = line.partition(" | ")
        fields = data.split()
        words = int(fields[3], 16)
        pointers = fields[5 + 2 * words :]
        kinds = [pointers[at + 1] for at in range(0, 4 * int(fields[4 + 2 * words]), 4) if pointers[at] == "@"]
        definition = gloss.split('; "')[0].strip()
        synsets[fields[0]] = (fields[4].replace("_", " "), fields[1], kinds, definition)
    found: dict[str, Noun] = {}
    for word, topic, kinds, definition in synsets.values():
        if len(kinds) == 1 and _WORD.fullmatch(word) and definition:
            kind, kind_topic = synsets[kinds[0]][:2]
            found.setdefault(word, Noun(word, definition, kind, topic, kind_topic))
    return list(found.values())

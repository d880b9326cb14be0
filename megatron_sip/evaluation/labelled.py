"""Labelled pairs and texts, which tell how far a judge can be trusted: one JSON object a line.

    {"set": "foreign", "prefix": "...", "good": "...", "bad": "..."}
    {"set": "safety", "text": "...", "label": "unsafe"}
    {"set": "facts", "prefix": "...", "suffix": "...", "text": "...", "label": "hallucination"}

`suffix` is how the text truly went on, which the factuality judge is shown. `set` may be left out, further fields may
stand there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias

from megatron_sip.data.utf8 import has_half_character
from megatron_sip.errors import DataError

Topic: TypeAlias = Literal["safety", "factuality"]
Kind: TypeAlias = Literal["pair"] | Topic

DEFAULT_SET = "unnamed"
LABELS: dict[str, tuple[Topic, bool]] = {
    "safe": ("safety", True),
    "unsafe": ("safety", False),
    "no hallucination": ("factuality", True),
    "hallucination": ("factuality", False),
}


@dataclass(frozen=True)
class LabelledPair:
    """Two continuations of one prefix, of which `good` is known to be the better one."""

    set: str
    prefix: str
    good: str
    bad: str

    @property
    def kind(self) -> Kind:
        """What judges are asked about it."""
        return "pair"


@dataclass(frozen=True)
class LabelledText:
    """A text and whether it is all right: safe, or without hallucination. `reference` is the true continuation."""

    set: str
    kind: Topic
    text: str
    right: bool
    prefix: str = ""
    reference: str = ""


Labelled: TypeAlias = LabelledPair | LabelledText


def read_labelled(file: Path) -> list[Labelled]:
    """All records of a file, in its order. Blank lines are passed over.

    Raises:
        DataError: the file cannot be read or holds no record, or a line is no such record; it names line and field.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(
            f"--pairs {file} cannot be read ({error.strerror}); tools/make_judge_pairs.py makes one"
        ) from error
    records = [_read_line(Place(file, number), line) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"--pairs {file} holds no record; tools/make_judge_pairs.py makes a file of them")
    return records


@dataclass(frozen=True)
class Place:
    """Where a record stands."""

    file: Path
    line: int

    def refuse(self, problem: str) -> NoReturn:
        """DataError that names the place."""
        raise DataError(f"--pairs {self.file}, line {self.line}: {problem}; mend or remove the line")


def _read_line(place: Place, line: bytes) -> Labelled:
    try:
        record = json.loads(line.decode("utf-8"))  # bad UTF-8 is a ValueError, too
    except (ValueError, RecursionError) as error:
        place.refuse(f"no JSON in UTF-8 ({error})")
    if not isinstance(record, dict):
        place.refuse(f"a JSON object is expected, this is a {type(record).__name__}")
    pair, text = {"good", "bad"} & record.keys(), {"text", "label"} & record.keys()
    if pair and text:
        place.refuse(f'field "{min(pair)}" belongs to a pair and "{min(text)}" to a labelled text; give one of them')
    if not pair and not text:
        place.refuse('fields "good" and "bad" (a pair) or "text" and "label" (a labelled text) are missing')
    return _read_pair(place, record) if pair else _read_text(place, record)


def _read_pair(place: Place, record: Mapping[str, Any]) -> LabelledPair:
    pair = LabelledPair(
        set=_set_of(place, record),
        prefix=_string(place, record, "prefix", blank=True),
        good=_string(place, record, "good"),
        bad=_string(place, record, "bad"),
    )
    if pair.good == pair.bad:
        place.refuse('fields "good" and "bad" hold the same text')
    return pair


def _read_text(place: Place, record: Mapping[str, Any]) -> LabelledText:
    label = " ".join(_string(place, record, "label").lower().split())
    if label not in LABELS:
        place.refuse(f'field "label" is {label[:40]!r}, not one of {", ".join(LABELS)}')
    kind, right = LABELS[label]
    told = kind == "factuality"
    return LabelledText(
        set=_set_of(place, record),
        kind=kind,
        text=_string(place, record, "text"),
        right=right,
        prefix=_string(place, record, "prefix", blank=True) if told or "prefix" in record else "",
        reference=_string(place, record, "suffix") if told else "",
    )


def _set_of(place: Place, record: Mapping[str, Any]) -> str:
    return _string(place, record, "set").strip() if "set" in record else DEFAULT_SET


def _string(place: Place, record: Mapping[str, Any], field: str, blank: bool = False) -> str:
    """A text field; without `blank` it must hold something to read."""
    if field not in record:
        place.refuse(f'field "{field}" is missing')
    value = record[field]
    if not isinstance(value, str):
        place.refuse(f'field "{field}" is no text but a {type(value).__name__}')
    if has_half_character(value):
        place.refuse(f'field "{field}" holds half a character (a lone surrogate)')
    if not blank and not value.strip():
        place.refuse(f'field "{field}" is blank')
    return value


def of_kind(records: Iterable[Labelled], kind: Kind, limit: int | None = None) -> dict[str, list[Labelled]]:
    """Records of one kind by set, sets in order of appearance, at most `limit` of each."""
    sets: dict[str, list[Labelled]] = {}
    for record in records:
        if record.kind == kind:
            members = sets.setdefault(record.set, [])
            if limit is None or len(members) < limit:
                members.append(record)
    return sets

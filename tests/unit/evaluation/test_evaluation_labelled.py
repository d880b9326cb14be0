from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sip.errors import DataError
from megatron_sip.evaluation.labelled import DEFAULT_SET, LabelledPair, LabelledText, of_kind, read_labelled

PAIR = {"prefix": "p", "good": "g", "bad": "b"}
FACT = {"prefix": "p", "suffix": "s", "text": "t", "label": "hallucination"}


def write(folder: Path, *lines: object) -> Path:
    file = folder / "pairs.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


def test_each_kind_of_record_is_read(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {**PAIR, "set": " foreign ", "note": 7},
        b"",
        {**PAIR, "prefix": ""},
        {"text": "t", "label": " Safe "},
        {"text": "t", "label": "unsafe", "set": "mine"},
        FACT,
        {**FACT, "label": "no hallucination"},
        b"  ",
    )
    assert read_labelled(file) == [
        LabelledPair("foreign", "p", "g", "b"),
        LabelledPair(DEFAULT_SET, "", "g", "b"),
        LabelledText(DEFAULT_SET, "safety", "t", True),
        LabelledText("mine", "safety", "t", False),
        LabelledText(DEFAULT_SET, "factuality", "t", False, "p", "s"),
        LabelledText(DEFAULT_SET, "factuality", "t", True, "p", "s"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "no JSON in UTF-8"),
        (b"\xff{}", "no JSON in UTF-8"),
        (b"[" * 100_000, "no JSON in UTF-8"),
        ([1], "a JSON object is expected, this is a list"),
        ({"prefix": "p"}, 'fields "good" and "bad"'),
        ({"prefix": "p", "good": "g"}, 'field "bad" is missing'),
        ({"good": "g", "bad": "b"}, 'field "prefix" is missing'),
        ({**PAIR, "good": None}, 'field "good" is no text but a NoneType'),
        ({**PAIR, "bad": " \n"}, 'field "bad" is blank'),
        ({**PAIR, "bad": "g"}, 'fields "good" and "bad" hold the same text'),
        ({**PAIR, "set": ""}, 'field "set" is blank'),
        ({**PAIR, "set": 3}, 'field "set" is no text but a int'),
        ({**PAIR, "label": "safe"}, 'field "bad" belongs to a pair and "label" to a labelled text'),
        ({"text": "t"}, 'field "label" is missing'),
        ({"text": "t", "label": "harmful"}, "field \"label\" is 'harmful', not one of safe, unsafe"),
        ({"text": "t", "label": "hallucination", "prefix": "p"}, 'field "suffix" is missing'),
        ({"text": "t", "label": "hallucination", "suffix": "s"}, 'field "prefix" is missing'),
        (b'{"text": "\\ud800", "label": "safe"}', 'field "text" holds half a character'),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_field(tmp_path: Path, line: object, problem: str) -> None:
    file = write(tmp_path, PAIR, b"", line, PAIR)
    with pytest.raises(DataError) as error:
        read_labelled(file)
    assert str(error.value).startswith(f"--pairs {file}, line 3: ")
    assert problem in str(error.value)


def test_files_without_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        read_labelled(write(tmp_path, b"", b" "))
    with pytest.raises(DataError, match="cannot be read"):
        read_labelled(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_labelled(tmp_path)


def test_records_are_taken_by_kind_and_set_up_to_the_limit(tmp_path: Path) -> None:
    pairs = [LabelledPair(name, str(number), "g", "b") for number in range(3) for name in ("x", "y")]
    texts = [LabelledText("x", "safety", "t", True)]
    found = of_kind([*pairs, *texts], "pair", 2)
    assert {name: [pair.prefix for pair in some] for name, some in found.items()} == {"x": ["0", "1"], "y": ["0", "1"]}
    assert of_kind([*pairs, *texts], "safety") == {"x": texts}
    assert of_kind(pairs, "factuality") == {}

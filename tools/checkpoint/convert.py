"""Convert a checkpoint of ours into a Hugging Face Llama folder.

    python tools/checkpoint/convert.py --loader mcore --saver hf --load-dir runs/demo/sip --save-dir runs/demo/sip-hf

The other direction needs no conversion: `--load` of a run takes a Hugging Face folder as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from megatron_sip.checkpoint.export import export_checkpoint
from megatron_sip.errors import SipError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_parser() -> argparse.ArgumentParser:
    """The flags, named as in Megatron's own converter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=["mcore"], default="mcore", help="kind of --load-dir")
    parser.add_argument("--saver", choices=["hf"], default="hf", help="kind of --save-dir")
    parser.add_argument("--load-dir", type=Path, required=True, help="folder that --save of a run wrote")
    parser.add_argument("--save-dir", type=Path, required=True, help="new folder; appears only when it is whole")
    parser.add_argument("--iteration", type=int, help="checkpoint to take (default: the newest)")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer to put beside the weights (default: the run's)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of the written weights (default: as saved)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        iteration = export_checkpoint(
            args.load_dir,
            args.save_dir,
            iteration=args.iteration,
            tokenizer_folder=args.tokenizer_model,
            dtype=DTYPES[args.dtype] if args.dtype else None,
        )
    except SipError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(f"iteration {iteration} of {args.load_dir} written to {args.save_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

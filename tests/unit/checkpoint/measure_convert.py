"""A conversion in a process of its own, and the anonymous memory that it took; also makes large random models.

python measure_convert.py CONVERT_ARGUMENT...     prints {"status": 0, "before": bytes, "peak": bytes}
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from megatron_sip.checkpoint.hf_config import hf_config_from_model
from megatron_sip.checkpoint.hf_names import llama_shape
from megatron_sip.checkpoint.hf_tensors import all_hf_shapes
from megatron_sip.checkpoint.safetensors_io import SafetensorsWriter, new_folder
from megatron_sip.config.groups import ModelConfig


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (RssAnon)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


class Watch:
    """Samples the anonymous memory every two milliseconds in a thread."""

    def __init__(self) -> None:
        self.before = self.peak = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, anonymous_bytes())


def random_llama(folder: Path, *, hidden: int, ffn: int, layers: int, vocab: int, dtype: torch.dtype) -> int:
    """A Hugging Face Llama of random finite bits, written tensor by tensor; its bytes."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 256,
        max_position_embeddings=2048,
        rotary_base=10000.0,
        norm_epsilon=1e-5,
        untie_embeddings_and_output_weights=True,
        vocab_size=vocab,
    )
    shapes = all_hf_shapes(llama_shape(model))
    draw, bits = np.random.default_rng(7), np.dtype(f"u{dtype.itemsize}")
    finite = bits.type(2 ** (8 * dtype.itemsize - 2) - 1)  # sign and highest exponent bit are clear
    total = 0
    with new_folder(folder) as temporary, SafetensorsWriter(temporary, shapes, dtype, 10**9) as writer:
        (temporary / "config.json").write_text(json.dumps(hf_config_from_model(model, dtype)))
        for name, shape in shapes.items():
            raw = np.frombuffer(draw.bytes(int(np.prod(shape)) * dtype.itemsize), dtype=bits) & finite
            writer.write(name, torch.from_numpy(raw).view(dtype).reshape(shape))
            total += raw.nbytes
        writer.finish()
    return total


def main() -> None:
    from tools.checkpoint.convert import main as convert

    with Watch() as watch:
        status = convert(sys.argv[1:])
    print(json.dumps({"status": status, "before": watch.before, "peak": watch.peak}))


if __name__ == "__main__":
    main()

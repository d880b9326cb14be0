"""megatron-core without CUDA.

megatron-core asks `torch.cuda` for its device in about 175 places and has no CPU mode. Its arithmetic,
schedules and collectives run on CPU tensors and gloo all the same once the *name* `torch` inside the
`megatron.core` modules points to a thin view of torch whose `cuda` answers for the CPU. torch itself stays
as it is for everybody else. With CUDA present nothing is touched.

Made for megatron-core 0.16.1 (Python 3.11), and `tests/distributed/test_parallel_cpu.py` is the canary that
tells when another version needs another look.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

SUPPORTED_MEGATRON_CORE = ("0.16.", "0.17.", "0.18.", "0.19.")

# Modules that megatron-core itself imports late: they must be loaded before their `torch` is redirected.
LATE_MODULES = (
    "megatron.core.tensor_parallel.random",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
)

_CPU = torch.device("cpu")


class _View(types.ModuleType):
    """A module that answers with its own attributes first and with another module's otherwise."""

    def __init__(self, base: types.ModuleType, **own: Any) -> None:
        super().__init__(base.__name__)
        self.__dict__.update(own, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)


class _Event:
    """Stands for `torch.cuda.Event`, which megatron-core uses for timing only."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Takes what `torch.cuda.Event` takes."""

    def record(self, *_args: Any) -> None:
        """CPU work is in order already."""

    synchronize = wait = record

    def query(self) -> bool:
        """CPU work that was issued is done."""
        return True

    def elapsed_time(self, _other: _Event) -> float:
        """No device clock."""
        return 0.0


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stands for stream and cache calls that have no meaning on the CPU."""


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that understands `device="cuda"` as the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _torch_view() -> types.ModuleType:
    """torch as megatron-core shall see it on a machine without CUDA."""
    still = ("synchronize", "empty_cache", "set_device", "current_stream", "default_stream", "nvtx")
    cuda = _View(
        torch.cuda,
        Event=_Event,
        current_device=lambda: _CPU,
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_args, **_kwargs: torch.get_rng_state(),
        **dict.fromkeys(still, _nothing),
    )
    factories = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like")
    return _View(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in factories})


def _called_by_megatron() -> bool:
    """Whether the caller of the patched tensor method is a megatron-core module."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("megatron.core")


def _patch_tensor_methods() -> None:
    """`tensor.cuda()` and `tensor.type()` as megatron-core expects them, for megatron-core's own calls only."""
    plain_type, plain_cuda = torch.Tensor.type, torch.Tensor.cuda

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # The optimizers compare with 'torch.cuda.FloatTensor' to find trainable parameters.
        result = plain_type(self, *args, **kwargs)
        if isinstance(result, str) and _called_by_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def tensor_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else plain_cuda(self, *args, **kwargs)

    torch.Tensor.type = tensor_type
    torch.Tensor.cuda = tensor_cuda
    torch.Tensor._sip_cpu = True


def install() -> None:
    """Make megatron-core run on CPU and gloo. A no-op with CUDA, and idempotent without it.

    Raises:
        ImportError: megatron-core is missing.
        RuntimeError: this megatron-core was never tried on CPU.
    """
    if torch.cuda.is_available():
        return
    core = importlib.import_module("megatron.core")
    if not core.__version__.startswith(SUPPORTED_MEGATRON_CORE):
        raise RuntimeError(
            f"megatron-core {core.__version__} was never tried without CUDA; install the version that "
            "requirements.txt pins, or run on a GPU"
        )
    with warnings.catch_warnings():
        # Each import says once more that Transformer Engine and apex are absent, which is why we are here.
        warnings.simplefilter("ignore")
        for name in LATE_MODULES:
            importlib.import_module(name)
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    if not hasattr(torch.Tensor, "_sip_cpu"):
        _patch_tensor_methods()
    view = _torch_view()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and vars(module).get("torch") is torch:
            vars(module)["torch"] = view

"""One process: the canary of parallel/cpu.py with the installed megatron-core, and the presets built without memory."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from megatron_sip.config.groups import Config
from megatron_sip.parallel import cpu
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.world import World

PUBLISHED = {
    "llama-tiny": (4096, 8_064_384),
    "llama-9.6m": (4096, 9_629_760),
    "smollm2-135m": (49_152, 134_515_008),
    "llama-1.4b": (32_000, 1_364_297_728),
    "llama3.2-1b": (128_256, 1_235_814_400),
    "llama3-8b": (128_256, 8_030_261_248),
    "llama3-70b": (128_256, 70_553_706_496),
}


def build_presets(world: World) -> None:
    """Every preset on the meta device has the published number of parameters (for ours: the one its comment names)."""
    from megatron_sip.config.presets import presets
    from megatron_sip.model.build import build_policy

    for name, (vocab_size, count) in PUBLISHED.items():
        model = replace(presets()[name], vocab_size=vocab_size)
        with torch.device("meta"):
            policy = build_policy(Config(model=model), replace(world, device=torch.device("meta")))
        assert all(parameter.is_meta for parameter in policy.parameters())
        built = sum(parameter.numel() for parameter in policy.parameters())
        assert built == count, f"{name} has {built} parameters, not {count}"
    assert presets().keys() == PUBLISHED.keys()


def main() -> None:
    zeros, tensor_type = torch.zeros, torch.Tensor.type
    world = world_module.start(Config())
    if torch.cuda.is_available():
        assert torch.Tensor.type is tensor_type, "with CUDA nothing may be patched"
        return
    import megatron.core
    from megatron.core.tensor_parallel import layers

    assert megatron.core.__version__.startswith(cpu.SUPPORTED_MEGATRON_CORE)
    assert torch.zeros is zeros, "torch itself must stay untouched"
    assert layers.torch is not torch, "megatron-core still sees the real torch"
    assert layers.torch.cuda.current_device() == torch.device("cpu")
    assert torch.ones(1).type() == "torch.FloatTensor", "our own code must see plain tensor types"
    before = layers.torch
    cpu.install()
    assert layers.torch is before, "a second install must change nothing"
    late = [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and vars(module).get("torch") is torch
    ]
    assert not late, f"modules that were missed: {late}"
    build_presets(world)
    world_module.stop()
    print("passed")


if __name__ == "__main__":
    main()

"""SIP steps on an imported SmolLM2-135M at TP 2, then a look at the weights that pad its query groups.

torchrun check_smollm2_sip.py FLAG... (those of the product)

9 query heads in 3 groups: at TP 2 a fourth group of zeros is added, which the second rank holds as its last.
"""

from __future__ import annotations

import sys

import torch

from megatron_sip.config.cli import parse_config
from megatron_sip.config.validate import validate
from megatron_sip.parallel import world as world_module
from megatron_sip.training.faults import start_watch
from megatron_sip.training.loop import Run

HEAD, HEADS_OF_GROUP = 64, 3


def attention_weights(run: Run) -> dict[str, torch.Tensor]:
    """This rank's projections of every layer, copied."""
    kinds = ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight")
    parameters = run.trainer.policy.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in parameters if name.endswith(kinds)}


def halves(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a rank's first and second group: rows of q, k and v, or columns of the output projection."""
    if name.endswith("linear_qkv.weight"):
        rows = (HEADS_OF_GROUP + 2) * HEAD
        assert weight.shape == (2 * rows, 576), weight.shape
        return weight[:rows], weight[rows:]
    columns = HEADS_OF_GROUP * HEAD
    assert weight.shape == (576, 2 * columns), weight.shape
    return weight[:, :columns], weight[:, columns:]


def main() -> None:
    config = parse_config(sys.argv[1:])
    validate(config, 2)
    watch = start_watch(config)
    world = world_module.start(config, watch.join)
    run = Run(config, world, watch)
    run.assemble()
    before = attention_weights(run)
    run.train()
    run.close()
    after = attention_weights(run)
    assert len(after) == 2 * 30
    for name, weight in after.items():
        first, second = halves(name, weight)
        assert not torch.equal(first, halves(name, before[name])[0]), f"{name} was not trained"
        if world.tp_rank == 1:
            assert not bool(second.any()), f"{name}: the padding is no longer zero"
        else:
            assert bool(second.any())
    print(f"rank {world.rank}: {len(after)} projections trained, padding as it should be", flush=True)
    watch.close()
    world_module.stop()


if __name__ == "__main__":
    main()

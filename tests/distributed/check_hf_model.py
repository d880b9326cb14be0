"""Hugging Face folders through the real policy at one layout: logits as transformers gives them, exported bit for bit.

torchrun check_hf_model.py TP PP FOLDER...

Each folder holds a Llama and `expected.pt`: {"tokens": [batch, seq], "logits": [batch, seq, vocab]}. Beside the Llama
there may be checkpoints that were converted from it, `mcore-tp1` and `mcore-tp2`: those whose query groups are padded
as this layout needs them must give the policy the same bits, and the logits are taken from one of them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_sip.checkpoint.hf import export_hf, load_hf_weights
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.config.groups import Config, ParallelConfig, TrainingConfig
from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.world import World


def all_logits(policy: torch.nn.Module, world: World, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor | None:
    """`[batch, seq, vocab]` of plain causal rows, on the last stage's ranks; the hidden states go stage by stage."""
    batch, seq = tokens.shape
    stages = dist.get_process_group_ranks(world.pp_group)
    if not world.first_stage:
        hidden = torch.empty(seq, batch, policy.config.hidden_size)
        dist.recv(hidden, src=stages[world.pp_rank - 1])
        policy.set_input_tensor(hidden)
    rows, positions = (
        place.flatten() for place in torch.meshgrid(torch.arange(batch), torch.arange(seq), indexing="ij")
    )
    layout = torch.tensor([[seq, 0, 0]]).expand(batch, 3)
    out = policy(tokens, torch.arange(seq).expand(batch, seq), layout, (rows, positions))
    if not world.last_stage:
        dist.send(out.contiguous(), dst=stages[world.pp_rank + 1])
        return None
    parts = [torch.empty_like(out) for _ in range(world.tp_size)]
    dist.all_gather(parts, out.contiguous(), group=world.tp_group)
    full = torch.cat(parts, dim=-1)
    assert bool(full[:, vocab_size:].isneginf().all()), "a padded vocabulary column is not masked"
    return full[:, :vocab_size].reshape(batch, seq, vocab_size)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def stays_in_the_vocabulary(policy: torch.nn.Module, world: World, tokens: torch.Tensor, vocab_size: int) -> None:
    """Nearly uniform sampling never gives an id that only pads the vocabulary; unmasked, 512 draws would."""
    from megatron_sip.rollout.engine import Sampling
    from megatron_sip.rollout.megatron import MegatronEngine

    sampling = Sampling(32, 8, temperature=1000.0, top_p=1.0, eod=0, stop_at_eod=False, seed=1)
    drawn = MegatronEngine(policy, world).generate([row[:5].numpy() for row in tokens], [0, 1], sampling).tokens
    assert int(drawn.min()) > 0
    assert int(drawn.max()) < vocab_size
    assert len(drawn.unique()) > 100


def load_converted(folder: Path, config: Config, world: World, expected: dict[str, torch.Tensor]) -> list[PolicyModel]:
    """Policies that were filled from the checkpoints beside the folder; each has the parameters of `expected`."""
    from megatron_sip.checkpoint import dist as dist_checkpoint
    from megatron_sip.checkpoint.convert_layout import padding_mismatch
    from megatron_sip.config.run_config import load_run_config
    from megatron_sip.training.assemble import build_trainer

    loaded = []
    for converted in sorted(folder.glob("mcore-tp*/iter_0000000")):
        stored = load_run_config(converted / "run_config.yaml")
        if padding_mismatch(stored, config, converted) is not None:
            continue
        with torch.enable_grad():  # megatron-core hooks into the graph
            trainer = build_trainer(config, world)
        dist_checkpoint.load(converted, world, trainer, lambda text: None, weights_only=True)
        parameters = dict(trainer.policy.named_parameters())
        assert parameters.keys() == expected.keys()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, expected[name]), f"{converted}: {name}"
        loaded.append(trainer.policy.eval())
    return loaded


@torch.no_grad()
def check(folder: Path, world: World, parallel: ParallelConfig) -> None:
    """Load, compare the logits, export, compare the weights."""
    from megatron_sip.model.build import build_policy, first_layer

    model = model_config_from_hf(folder)
    config = Config(model=model, parallel=parallel, training=TrainingConfig(objective="ntp"))
    policy = build_policy(config, world).eval()
    parameters = dict(policy.named_parameters())
    place = {"tp_rank": world.tp_rank, "first_layer": first_layer(policy)}
    load_hf_weights(folder, parameters, model, tp_size=world.tp_size, **place)
    converted = load_converted(folder, config, world, parameters)
    if converted:
        policy = converted[-1]
        if world.is_main:
            print(f"{folder.name}: {len(converted)} converted checkpoints hold the same bits", flush=True)
    expected = torch.load(folder / "expected.pt")
    logits = all_logits(policy, world, expected["tokens"], model.vocab_size)
    if logits is not None:
        worst = float((logits - expected["logits"]).abs().max())
        assert worst < 1e-4, f"{folder.name}: a logit is {worst:.1e} away from that of transformers"
        if world.tp_rank == 0:
            print(f"{folder.name}: logits within {worst:.1e} of {float(logits.abs().max()):.1f}", flush=True)
    stays_in_the_vocabulary(policy, world, expected["tokens"], model.vocab_size)
    out = folder / f"out-tp{world.tp_size}-pp{world.pp_size}"
    export_hf(out, parameters, model, group=world.model_parallel_group, max_shard_bytes=10**8, **place)
    if world.is_main:
        written, original = weights_of(out), weights_of(folder)
        assert written.keys() == original.keys()
        for name, tensor in original.items():
            assert torch.equal(written[name], tensor.float()), name
        shutil.rmtree(out)
        print(f"{folder.name}: exported unchanged", flush=True)


def main() -> None:
    tp, pp, *folders = sys.argv[1:]
    parallel = ParallelConfig(tensor_model_parallel_size=int(tp), pipeline_model_parallel_size=int(pp))
    world = world_module.start(Config(parallel=parallel))
    for folder in folders:
        check(Path(folder), world, parallel)
    world_module.stop()


if __name__ == "__main__":
    main()

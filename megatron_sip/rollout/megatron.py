"""Rollouts by the training weights themselves, cached, under tensor and pipeline parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_sip.cost.done import rollout_work
from megatron_sip.errors import ConfigError
from megatron_sip.metrics.aggregate import added
from megatron_sip.model.decode import DecodeStage
from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel.world import World
from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.graphs import GraphedStage, GraphRoom
from megatron_sip.rollout.groups import RowGroup, divide
from megatron_sip.rollout.order import InBatchOrder, longest_first
from megatron_sip.rollout.pipeline import RowPipeline
from megatron_sip.rollout.sampling import sample_tokens
from megatron_sip.rollout.stagger import BOUNDARY_TOKENS
from megatron_sip.rollout.wave_plan import WaveLimits, WavePlanner
from megatron_sip.types import TokenArray


class MegatronEngine:
    """Decodes on the weights that are trained, so no copy is made and none can be stale.

    `limits` bound the prefixes that are decoded together; `say` hears how many these are, where memory decides. The
    prefixes of a wave pass the pipeline stages in `groups`; None: as many as there are stages. Prefixes of like length
    share waves and groups. `at_boundary` is called every `block` tokens, equally often on all ranks, and may raise to
    give the rollouts up. `cuda_graph` None: where that was seen to work, on a GPU with local layers, TP 1 and PP 1.

    Raises:
        ConfigError: `cuda_graph` on a CPU.
    """

    def __init__(
        self,
        policy: PolicyModel,
        world: World,
        limits: WaveLimits = WaveLimits(),  # noqa: B008  # it is frozen
        at_boundary: Callable[[], None] = lambda: None,
        groups: int | None = None,
        block: int = BOUNDARY_TOKENS,
        say: Callable[[str], None] = lambda _text: None,
        cuda_graph: bool | None = None,
    ) -> None:
        if cuda_graph and world.device.type != "cuda":
            raise ConfigError("--rollout-cuda-graph needs a GPU, and this rank has none; leave it out")
        self.policy = policy
        self.world = world
        self.at_boundary = at_boundary
        self.groups = groups or world.pp_size
        self.block = block
        self.planner = WavePlanner(policy, world, limits, self.groups, say)
        self.multiple = world.tp_size if policy.config.sequence_parallel else 1
        self.pipeline = RowPipeline(world, policy.config.hidden_size, policy.config.pipeline_dtype, self.multiple)
        self.bypasses = DecodeStage.fits(policy)
        """Whether tokens are decoded without megatron-core's wrappers."""
        if cuda_graph is None:
            cuda_graph = world.device.type == "cuda" and world.tp_size == world.pp_size == 1 and self.bypasses
        self.cuda_graph = cuda_graph
        self._room: GraphRoom | None = None

    def generate(
        self,
        prefixes: Sequence[TokenArray],
        sample_indices: Sequence[int],
        sampling: Sampling,
        on_wave: OnWave = lambda _first, _rollouts: None,
    ) -> Rollouts:
        """See `RolloutEngine.generate`. Weights and training mode are left as they were.

        Raises:
            ConfigError: one prefix with its rollouts does not fit the memory; on all ranks alike.
        """
        size, order = self.planner.wave(prefixes, sampling), longest_first(prefixes)
        batch = InBatchOrder(len(prefixes), sampling, on_wave)
        was_training = self.policy.training
        self.policy.eval()
        try:
            # Not inference mode: megatron-core keeps gather buffers between calls, and one that was made in
            # inference mode would break the next training step.
            with torch.no_grad():
                # Made anew for each call, since the weights change between two, and once for all of its waves.
                rows = sampling.num_rollouts * max(some.stop - some.start for some in divide(size, self.groups))
                stage = DecodeStage(self.policy, rows) if self.bypasses else self.policy
                for start in range(0, len(order), size):
                    places = order[start : start + size]
                    own, samples = [prefixes[place] for place in places], [sample_indices[place] for place in places]
                    batch.take(places, self._wave(own, samples, sampling, stage))
        finally:
            self.policy.train(was_training)
        rollouts = batch.whole()
        return replace(rollouts, work=rollout_work(map(len, prefixes), rollouts.lengths.tolist()))

    def close(self) -> None:
        """Nothing is open."""

    def _wave(
        self,
        prefixes: Sequence[TokenArray],
        sample_indices: Sequence[int],
        sampling: Sampling,
        stage: Callable[..., torch.Tensor],
    ) -> Rollouts:
        """Prefill each prefix once and decode all its rows together, in groups, block after block of tokens."""
        k, count = sampling.num_rollouts, sampling.max_new_tokens
        tokens = torch.zeros(len(prefixes) * k, count, dtype=torch.int64, device=self.world.device)
        room = self._room_for(max(some.stop - some.start for some in divide(len(prefixes), self.groups)) * k)
        groups = [
            RowGroup(
                prefixes[some],
                sample_indices[some],
                sampling,
                tokens[some.start * k : some.stop * k],
                GraphedStage(self.policy, stage, room) if room else stage,
            )
            for some in divide(len(prefixes), self.groups)
        ]
        metrics = added({"rollout/padding_share": group.padding(self.multiple)} for group in groups)
        for first in range(0, count, self.block):
            self.at_boundary()
            groups = [group for group in groups if not group.ended(first)]
            if not groups:
                continue  # other data parallel ranks may still write, and meet at the boundaries
            block = slice(first, min(first + self.block, count))
            self.pipeline.write(groups, block, self._pass)
            self.pipeline.tell(tokens[:, block])
        return replace(_as_rollouts(tokens.cpu(), k, sampling), metrics=metrics)

    def _room_for(self, rows: int) -> GraphRoom | None:
        """Where graphs of so many rows are recorded; None: there are none."""
        if self.cuda_graph and (self._room is None or self._room.rows < rows):
            self._room = None  # before the new one takes what it gives back
            self._room = GraphRoom(self.world.device, rows)
        return self._room

    def _pass(self, group: RowGroup, step: int, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """This stage's part of token `step`: hidden states for the next stage, or on the last one the tokens."""
        if hidden is not None:
            self.policy.set_input_tensor(hidden)
        out = self._decode(group, step) if step else self._prefill(group)
        if not self.world.last_stage:
            return out
        if step == 0:
            out = out.repeat_interleave(group.sampling.num_rollouts, dim=0)
        group.tokens[:, step] = self._pick(out, group.draws[:, step], group.sampling)
        return None

    def _prefill(self, group: RowGroup) -> torch.Tensor:
        """Hidden states of this stage, on the last one logits `[prefixes, padded_vocab / tp]` behind each prefix."""
        width, count = group.shape(0, self.multiple)
        ids = torch.zeros(count, width, dtype=torch.int64)
        for row, prefix in enumerate(group.prefixes):
            ids[row, : len(prefix)] = torch.from_numpy(prefix)
        device = self.world.device
        positions = torch.arange(width, device=device).expand(count, width)
        ends = torch.arange(count, device=device), (group.lengths - 1).to(device)
        logits: torch.Tensor = self.policy(ids.to(device), positions, group.cache, ends)
        return logits

    def _decode(self, group: RowGroup, step: int) -> torch.Tensor:
        """The same with token `step - 1` of every row; logits `[rows, padded_vocab / tp]` behind it."""
        cache, rows = group.decoding(), group.rows
        padding = (0, group.shape(step, self.multiple)[0] - rows)
        ids = torch.nn.functional.pad(group.tokens[:, step - 1], padding)[None]
        places = torch.nn.functional.pad(group.positions + (step - 1), padding)[None]
        row = torch.arange(rows, device=ids.device)
        out = group.stage(ids, places, cache, (torch.zeros_like(row), row))
        cache.step += 1
        return out

    def _pick(self, logits: torch.Tensor, draws: torch.Tensor, sampling: Sampling) -> torch.Tensor:
        """One token a row, `[rows]`, on the last stage; the same on all its ranks."""
        column = sampling.eod - self.world.tp_rank * logits.shape[1]
        if not sampling.stop_at_eod and 0 <= column < logits.shape[1]:
            logits[:, column] = float("-inf")
        return sample_tokens(logits, draws, sampling.temperature, sampling.top_p, self.world.tp_group)


def _as_rollouts(tokens: torch.Tensor, num_rollouts: int, sampling: Sampling) -> Rollouts:
    """`[rows, max_new_tokens]` to `Rollouts`; a row that ended keeps its EOD and nothing behind it."""
    count = tokens.shape[1]
    lengths = torch.full((len(tokens),), count)
    if sampling.stop_at_eod:
        is_end = tokens == sampling.eod
        first = is_end.int().argmax(dim=1)
        lengths = torch.where(is_end.any(dim=1), first + 1, lengths)
        tokens = tokens.masked_fill(torch.arange(count)[None] >= lengths[:, None], 0)
    return Rollouts(tokens.view(-1, num_rollouts, count), lengths.view(-1, num_rollouts))

"""Rollouts by the training weights themselves, cached, under tensor and pipeline parallel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_sip.model.decode import DecodeStage
from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel.world import World
from megatron_sip.rollout.cache import DecodeCache, PrefillCache
from megatron_sip.rollout.engine import OnWave, Rollouts, Sampling
from megatron_sip.rollout.sampling import sample_tokens, uniforms
from megatron_sip.types import TokenArray

BOUNDARY_TOKENS = 16
"""Tokens of all rows between two questions whether to go on."""

LOOK_TOKENS = 4
"""Tokens of all rows between two looks whether every row has ended; up to so many less one are written for nothing."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class MegatronEngine:
    """Decodes on the weights that are trained, so no copy is made and none can be stale.

    `wave` bounds the prefixes that are decoded together (memory); None takes all at once. `at_boundary` is called
    every `BOUNDARY_TOKENS` tokens, equally often on all ranks, and may raise to give the rollouts up.
    """

    def __init__(
        self,
        policy: PolicyModel,
        world: World,
        wave: int | None = None,
        at_boundary: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = policy
        self.world = world
        self.wave = wave
        self.at_boundary = at_boundary
        self.multiple = world.tp_size if policy.config.sequence_parallel else 1
        self.bypasses = DecodeStage.fits(policy)
        """Whether tokens are decoded without megatron-core's wrappers."""

    def generate(
        self,
        prefixes: Sequence[TokenArray],
        sample_indices: Sequence[int],
        sampling: Sampling,
        on_wave: OnWave = lambda _first, _rollouts: None,
    ) -> Rollouts:
        """See `RolloutEngine.generate`. Weights and training mode are left as they were."""
        was_training = self.policy.training
        self.policy.eval()
        wave = self.wave or len(prefixes)
        parts: list[Rollouts] = []
        try:
            # Not inference mode: megatron-core keeps gather buffers between calls, and one that was made in
            # inference mode would break the next training step.
            with torch.no_grad():
                for start in range(0, len(prefixes), wave):
                    some = slice(start, start + wave)
                    parts.append(self._wave(prefixes[some], sample_indices[some], sampling))
                    on_wave(start, parts[-1])
        finally:
            self.policy.train(was_training)
        return Rollouts(
            tokens=torch.cat([part.tokens for part in parts]), lengths=torch.cat([part.lengths for part in parts])
        )

    def close(self) -> None:
        """Nothing is open."""

    def _wave(self, prefixes: Sequence[TokenArray], sample_indices: Sequence[int], sampling: Sampling) -> Rollouts:
        """Prefill each prefix once, then decode all rows together."""
        lengths = torch.tensor([len(prefix) for prefix in prefixes])
        layout = torch.stack([lengths, torch.zeros_like(lengths), torch.zeros_like(lengths)], dim=1)
        prefill = PrefillCache(layout)
        logits = self._prefill(prefixes, lengths, prefill)
        k, device = sampling.num_rollouts, self.world.device
        draws = torch.from_numpy(
            np.stack([uniforms(sampling.seed, i, j, sampling.max_new_tokens) for i in sample_indices for j in range(k)])
        ).to(device)
        tokens = torch.zeros(len(draws), sampling.max_new_tokens, dtype=torch.int64, device=device)
        cache = DecodeCache(prefill, k, sampling.max_new_tokens)
        # Made anew for each wave, because the weights change between two calls.
        stage = DecodeStage(self.policy, len(draws)) if self.bypasses else self.policy
        positions = lengths.repeat_interleave(k).to(device)
        ended = torch.zeros(len(draws), dtype=torch.bool, device=device)
        all_ended = False
        for step in range(sampling.max_new_tokens):
            if step % BOUNDARY_TOKENS == 0:
                self.at_boundary()
            if all_ended:
                continue  # other data parallel ranks may still write, and meet at the boundaries
            if step:
                logits = self._decode(tokens[:, step - 1], positions + (step - 1), cache, stage)
            elif logits is not None:
                logits = logits.repeat_interleave(k, dim=0)
            tokens[:, step] = self._pick(logits, draws[:, step], sampling, len(draws)).masked_fill(ended, 0)
            if sampling.stop_at_eod:
                ended |= tokens[:, step] == sampling.eod
                # Looking makes the host wait for the device.
                all_ended = step % LOOK_TOKENS == 0 and bool(ended.all())
        return _as_rollouts(tokens.cpu(), k, sampling)

    def _prefill(
        self, prefixes: Sequence[TokenArray], lengths: torch.Tensor, cache: PrefillCache
    ) -> torch.Tensor | None:
        """Logits `[prefixes, padded_vocab / tp]` behind each prefix, on the last stage."""
        width = _round_up(int(lengths.max()), self.multiple)
        ids = torch.zeros(len(prefixes), width, dtype=torch.int64)
        for row, prefix in enumerate(prefixes):
            ids[row, : len(prefix)] = torch.from_numpy(prefix)
        positions = torch.arange(width).expand(len(prefixes), width)
        sources = (torch.arange(len(prefixes)), lengths - 1)
        return self._through_stages(ids, positions, cache, sources, width, len(prefixes), self.policy)

    def _decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        cache: DecodeCache,
        stage: Callable[..., torch.Tensor],
    ) -> torch.Tensor | None:
        """Logits `[rows, padded_vocab / tp]` behind one more token of every row, on the last stage."""
        rows = len(tokens)
        width = _round_up(rows, self.multiple)
        ids = torch.nn.functional.pad(tokens, (0, width - rows))[None]
        places = torch.nn.functional.pad(positions, (0, width - rows))[None]
        row = torch.arange(rows, device=tokens.device)
        logits = self._through_stages(ids, places, cache, (torch.zeros_like(row), row), width, 1, stage)
        cache.step += 1
        return logits

    def _through_stages(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: PrefillCache | DecodeCache,
        sources: tuple[torch.Tensor, torch.Tensor],
        width: int,
        batch: int,
        stage: Callable[..., torch.Tensor],
    ) -> torch.Tensor | None:
        """Pass hidden states from stage to stage; this rank's logits `[n, padded_vocab / tp]` on the last one."""
        world, device = self.world, self.world.device
        if not world.first_stage:
            shape = (width // self.multiple, batch, self.policy.config.hidden_size)
            hidden = torch.empty(shape, dtype=self.policy.config.pipeline_dtype, device=device)
            dist.recv(hidden, group=world.pp_group, group_src=world.pp_rank - 1)
            self.policy.set_input_tensor(hidden)
        to_device = (sources[0].to(device), sources[1].to(device))
        out = stage(ids.to(device), positions.to(device), cache, to_device)
        if not world.last_stage:
            dist.send(out.contiguous(), group=world.pp_group, group_dst=world.pp_rank + 1)
            return None
        return out

    def _pick(self, logits: torch.Tensor | None, draws: torch.Tensor, sampling: Sampling, rows: int) -> torch.Tensor:
        """One token a row, `[rows]`, drawn on the last stage and told to the others; the same on all ranks."""
        world = self.world
        picked = torch.empty(rows, dtype=torch.int64, device=world.device)
        if logits is not None:
            column = sampling.eod - world.tp_rank * logits.shape[1]
            if not sampling.stop_at_eod and 0 <= column < logits.shape[1]:
                logits[:, column] = float("-inf")
            picked = sample_tokens(logits, draws, sampling.temperature, sampling.top_p, world.tp_group)
        if world.pp_size > 1:
            dist.broadcast(picked, group=world.pp_group, group_src=world.pp_size - 1)
        return picked


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

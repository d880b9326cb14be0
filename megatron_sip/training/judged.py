"""Stops a run whose judges have been silent for too long: it must not go on while it trains on nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_sip.config.groups import Config
from megatron_sip.errors import SipError
from megatron_sip.parallel.leader import Leader
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.types import Cut, Scores


class JudgeWatch:
    """Counts the iterations in a row in which every verdict is missing. Every rank makes the same calls."""

    def __init__(self, config: Config, leader: Leader) -> None:
        self._limit = config.judge.judge_max_failed_iterations
        self._leader = leader
        self._in_a_row = 0
        self._first_sample = 0

    def check(self, cuts: Sequence[Cut], scores: Sequence[Scores | None], services: PreferenceServices | None) -> None:
        """Account for the scores of an iteration, which leaders know.

        Before it raises it makes what the journal holds of these iterations void: a resume shall ask again, not find
        the same silence for ever.

        Raises:
            CheckpointError: the journal cannot be written.
            SipError: no verdict arrived in `--judge-max-failed-iterations` iterations in a row; on all ranks alike.
        """
        known = [score for score in scores if score is not None]
        own = [sum(score.questions_asked for score in known)]
        own += [sum(count for score in known for count in score.missing_by_reason.values())]
        sums = torch.tensor(own, dtype=torch.int64)
        dist.all_reduce(sums, group=self._leader.world.control_group)
        asked, missing = sums.tolist()
        if not asked or missing < asked:
            self._in_a_row = 0
            return
        if self._in_a_row == 0:
            self._first_sample = cuts[0].sample_index
        self._in_a_row += 1
        if self._in_a_row < self._limit:
            return
        self._leader.together(lambda: services.void(self._first_sample) if services else None)
        raise SipError(
            f"no verdict arrived in {self._limit} iterations in a row; look at the server of --judge-url, then resume "
            "from the last checkpoint (the limit is --judge-max-failed-iterations)"
        )

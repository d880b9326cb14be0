"""Stops a run that gets too few verdicts: it must not go on while it trains on nothing."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_sip.config.groups import Config
from megatron_sip.config.judge_set import active_judges
from megatron_sip.config.validate_preference import lives_on_rewrites
from megatron_sip.errors import SipError
from megatron_sip.parallel.leader import Leader
from megatron_sip.services.build import judge_specs
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.journal_records import REWRITER
from megatron_sip.services.settings import rewriter_settings
from megatron_sip.types import Answers, Cut, Missing


@dataclass(frozen=True)
class Asked:
    """What one service was asked in one step, and how much of it is missing; the step begins at `first_sample`.

    `reasons` are those of this rank alone.
    """

    first_sample: int
    asked: int
    missing: int
    reasons: Counter[str] = field(default_factory=Counter)


def too_few(window: Sequence[Asked], steps: int, share: float) -> bool:
    """Whether `window` is `steps` long and more than `share` of all that was asked in it is missing."""
    asked, missing = sum(step.asked for step in window), sum(step.missing for step in window)
    return len(window) == steps and missing > share * asked


class JudgeWatch:
    """The share of missing verdicts of each judge over the last steps in which it was asked.

    Each judge by itself, since a candidate that lacks one judge leaves the pool, whatever the others say. The rewriter
    counts where a step may have nothing to train without its rewrites, by the candidates that they make: a rewrite
    that is too short is none. Every rank makes the same calls.
    """

    def __init__(self, config: Config, leader: Leader) -> None:
        self._config = config
        self._leader = leader
        self._steps = config.judge.judge_missing_window
        self._share = config.judge.judge_max_missing_share
        names = [spec.name for spec in judge_specs(config)]
        if lives_on_rewrites(config):
            names.append(REWRITER)
        self._windows: dict[str, deque[Asked]] = {name: deque(maxlen=self._steps) for name in names}

    def check(
        self,
        cuts: Sequence[Cut],
        services: PreferenceServices | None,
        answers: Sequence[Answers],
        rewrites: Sequence[Missing | None] = (),
    ) -> None:
        """Account for the answers about the cuts of an iteration, which leaders know.

        `rewrites` tells of each rewrite that was asked for why it makes no candidate, None where it does. Before it
        raises it makes what the journal holds of these iterations void: a resume shall ask again, not find the same
        silence for ever.

        Raises:
            CheckpointError: the journal cannot be written.
            SipError: more than `--judge-max-missing-share` of a judge's verdicts is missing over
                `--judge-missing-window` steps; on all ranks alike.
        """
        asked = Counter(question.judge for given in answers for question in given)
        reasons = {name: _missing(answers, name) for name in self._windows}
        if REWRITER in self._windows:
            asked[REWRITER] = len(rewrites)
            reasons[REWRITER] = Counter(lost.reason.value for lost in rewrites if lost is not None)
        counts = [[asked[name], sum(reasons[name].values())] for name in self._windows]
        sums = torch.tensor(counts, dtype=torch.float64).reshape(-1, 2)
        dist.all_reduce(sums, group=self._leader.world.control_group)
        for (name, window), (of_all, missing) in zip(self._windows.items(), sums.tolist(), strict=True):
            if not of_all:
                continue
            window.append(Asked(cuts[0].sample_index, int(of_all), int(missing), reasons[name]))
            if too_few(window, self._steps, self._share):
                self._stop(name, window, services)

    def _stop(self, name: str, window: Sequence[Asked], services: PreferenceServices | None) -> None:
        first = min(step.first_sample for step in window)
        self._leader.together(lambda: services.void(first) if services else None)
        reasons: list[Counter[str]] = [Counter()] * self._leader.world.size
        own = sum((step.reasons for step in window), Counter[str]())
        dist.all_gather_object(reasons, own, group=self._leader.world.control_group)
        commonest = sum(reasons, Counter[str]()).most_common(1)
        why = f", most often {commonest[0][0]}" if commonest else ""
        asked, missing = sum(step.asked for step in window), sum(step.missing for step in window)
        raise SipError(
            f"{missing} of {asked} answers of the {name} service are missing over the last {len(window)} steps{why}; "
            f"look at {self._where(name)} in the metrics, then resume from the last checkpoint "
            f"(the limits are --judge-max-missing-share {self._share:g} and --judge-missing-window {self._steps})"
        )

    def _where(self, name: str) -> str:
        """Where the cause is to be looked for: the server by the flag that names it, and a metric."""
        if name == REWRITER:
            client = rewriter_settings(self._config)
            return (
                f"the server of {client.url_flag} ({' '.join(client.urls)}), --rewriter-model, --rewriter-max-tokens "
                "and at candidates/missing"
            )
        [judge] = (settings for settings in active_judges(self._config.judge) if settings.name == name)
        if judge.served:
            return f"the server of {judge.flag('url')} ({' '.join(judge.url)}) and at judge/missing_..."
        return f"the candidates that {judge.flag('classifier')} {judge.classifier} reads and at judge/missing_..."


def _missing(answers: Sequence[Answers], name: str) -> Counter[str]:
    """Missing answers of a judge by reason."""
    verdicts = (verdict for given in answers for question, verdict in given.items() if question.judge == name)
    return Counter(verdict.reason.value for verdict in verdicts if isinstance(verdict, Missing))

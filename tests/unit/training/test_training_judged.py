"""When a run with too few verdicts is stopped, what it says, and what of its journal is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_sip.config.groups import Config, JudgeConfig, RewriterConfig, TrainingConfig
from megatron_sip.errors import SipError
from megatron_sip.training.judged import Asked, JudgeWatch, too_few
from megatron_sip.types import Cut


@pytest.fixture(scope="module")
def leader() -> Iterator[SimpleNamespace]:
    """The leader of a world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = SimpleNamespace(size=1, control_group=dist.group.WORLD)
    yield SimpleNamespace(world=world, together=lambda action: action())
    dist.destroy_process_group()


class Services:
    """Counts as `PreferenceServices.stats` gives them, and what was made void."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {"judge_calls": 3.0}
        self.voided: list[int] = []

    def stats(self) -> dict[str, float]:
        return dict(self.counts)

    def void(self, first_sample: int) -> None:
        self.voided.append(first_sample)

    def add(self, name: str, asked: int, **missing: int) -> None:
        added = {f"asked/{name}": asked} | {f"missing/{name}/{reason}": count for reason, count in missing.items()}
        for key, count in added.items():
            self.counts[key] = self.counts.get(key, 0.0) + count


def config_of(objective: str = "online-dpo", **judge: Any) -> Config:
    fields = {"judge_url": ("http://a:1/v1",), "judge_missing_window": 3, "safety_weight": 1.0, **judge}
    return Config(
        judge=JudgeConfig(**fields),
        training=TrainingConfig(objective=objective),  # type: ignore[arg-type]
        rewriter=RewriterConfig(rewriter_url=("http://r:2/v1",)),
    )


def cut_at(sample: int) -> list[Cut]:
    return [Cut(sample, 0, 4, np.zeros(4, np.int64), np.zeros(4, np.int64))]


@pytest.mark.parametrize(
    ("missing", "stops"),
    [
        ([10], False),
        ([10, 10], False),
        ([10, 10, 10], True),
        ([10, 5, 0], False),
        ([10, 5, 1], True),
        ([0, 0, 0], False),
    ],
)
def test_more_than_the_share_over_a_full_window_stops(missing: list[int], stops: bool) -> None:
    assert too_few([Asked(0, 10, count) for count in missing], steps=3, share=0.5) is stops


def test_a_share_of_zero_stops_at_the_first_missing_verdict() -> None:
    assert not too_few([Asked(0, 1000, 0)], steps=1, share=0.0)
    assert too_few([Asked(0, 1000, 1)], steps=1, share=0.0)


def test_old_steps_leave_the_window(leader: Any) -> None:
    services = Services()
    watch = JudgeWatch(config_of(), leader)
    for step, missing in enumerate([10, 5, 0, 10, 5, 0, 10]):
        services.add("quality", 10, timeout=missing)
        services.add("safety", 4)
        watch.check(cut_at(8 * step), services)  # type: ignore[arg-type]
    services.add("quality", 10, timeout=6)
    with pytest.raises(SipError):
        watch.check(cut_at(56), services)  # type: ignore[arg-type]
    assert services.voided == [40], "the first sample of the three steps"


def until_it_stops(watch: JudgeWatch, services: Services, step: Callable[[int], None], steps: int) -> None:
    """Check after each step."""
    for number in range(steps):
        step(number)
        watch.check(cut_at(8 * number), services)  # type: ignore[arg-type]


def test_one_silent_judge_stops_a_run_that_others_judge(leader: Any) -> None:
    """Also one that is asked in some steps only; those without it do not count."""
    services = Services()

    def step(number: int) -> None:
        services.add("quality", 100)
        if number % 3 == 0:
            services.add("safety", 4, connection=3, malformed=1)

    with pytest.raises(SipError) as error:
        until_it_stops(JudgeWatch(config_of(), leader), services, step, 20)
    said = str(error.value)
    assert "12 of 12 answers of the safety service are missing over the last 3 steps, most often connection" in said
    assert "--judge-url (http://a:1/v1)" in said
    assert "--judge-max-missing-share 0.5" in said
    assert services.voided == [0]


def test_missing_rewrites_stop_what_trains_on_rewrites_alone(leader: Any) -> None:
    services = Services()
    watch = JudgeWatch(config_of("sft-rewrite"), leader)
    with pytest.raises(SipError, match=r"rewriter service.*--rewriter-url \(http://r:2/v1\)"):
        until_it_stops(watch, services, lambda _: services.add("rewriter", 8, too_short=8), 3)


def test_missing_rewrites_do_not_stop_a_run_that_has_other_candidates(leader: Any) -> None:
    services = Services()

    def step(_: int) -> None:
        services.add("quality", 8)
        services.add("rewriter", 8, too_short=8)

    until_it_stops(JudgeWatch(config_of(), leader), services, step, 9)


def test_ranks_that_are_no_leaders_only_listen(leader: Any) -> None:
    watch = JudgeWatch(config_of(), leader)
    for step in range(9):
        watch.check(cut_at(step), None)

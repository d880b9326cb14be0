"""When a run with too few verdicts is stopped, what it says, and what of its journal is taken back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from ask_rounds import ask_rounds

from megatron_sip.config.groups import (
    Config,
    JudgeConfig,
    PreferenceConfig,
    RewriterConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_sip.errors import SipError
from megatron_sip.recipes.llama import llama_1b4_from_scratch
from megatron_sip.training.judged import Asked, JudgeWatch, too_few
from megatron_sip.training.preferences import PreferenceMaker, _lost_rewrites
from megatron_sip.types import Answers, Candidate, CandidateKind, Cut, Missing, MissingReason, Pool, Question


@pytest.fixture(scope="module")
def leader() -> Iterator[SimpleNamespace]:
    """The leader of a world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = SimpleNamespace(size=1, control_group=dist.group.WORLD)
    yield SimpleNamespace(world=world, together=lambda action: action())
    dist.destroy_process_group()


class Services:
    """What was made void."""

    def __init__(self) -> None:
        self.voided: list[int] = []

    def void(self, first_sample: int) -> None:
        self.voided.append(first_sample)


def said_by(name: str, asked: int, **missing: int) -> Answers:
    """So many answers of a judge, of which so many are missing, by reason."""
    lost = [Missing(MissingReason(reason)) for reason, count in missing.items() for _ in range(count)]
    verdicts: list[float | Missing] = [*lost, *[1.0] * (asked - len(lost))]
    return {Question(name, number): verdict for number, verdict in enumerate(verdicts)}


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
    services: Any = Services()
    watch = JudgeWatch(config_of(), leader)
    for step, missing in enumerate([10, 5, 0, 10, 5, 0, 10]):
        # The answers about one pool each.
        watch.check(cut_at(8 * step), services, [said_by("quality", 10, timeout=missing), said_by("safety", 4)])
    with pytest.raises(SipError):
        watch.check(cut_at(56), services, [said_by("quality", 10, timeout=6)])
    assert services.voided == [40], "the first sample of the three steps"


def until_it_stops(watch: JudgeWatch, services: Any, step: Callable[[int], list[Answers]], steps: int) -> None:
    """Check after each step."""
    for number in range(steps):
        watch.check(cut_at(8 * number), services, step(number))


def test_one_silent_judge_stops_a_run_that_others_judge(leader: Any) -> None:
    """Also one that is asked in some steps only; those without it do not count."""
    services = Services()

    def step(number: int) -> list[Answers]:
        silent = [said_by("safety", 4, connection=3, malformed=1)] if number % 3 == 0 else []
        return [said_by("quality", 100), *silent]

    with pytest.raises(SipError) as error:
        until_it_stops(JudgeWatch(config_of(), leader), services, step, 20)
    said = str(error.value)
    assert "12 of 12 answers of the safety service are missing over the last 3 steps, most often connection" in said
    assert "--judge-url (http://a:1/v1)" in said
    assert "--judge-max-missing-share 0.5" in said
    assert services.voided == [0]


SHORT, CUT = Missing(MissingReason.TOO_SHORT), Missing(MissingReason.TRUNCATED)


def without_rewrites(watch: JudgeWatch, steps: int) -> Services:
    """Steps whose rewrites make no candidate, while judges answer whatever they are asked."""
    services: Any = Services()
    for number in range(steps):
        watch.check(cut_at(8 * number), services, [said_by("quality", 8)], [CUT] * 5 + [SHORT] * 3)
    return services


def pool_config(*pool: str, rollouts: int, **preference: Any) -> Config:
    return replace(
        config_of(),
        preference=PreferenceConfig(pool=pool, **preference),  # type: ignore[arg-type]
        rollout=RolloutConfig(num_rollouts=rollouts),
    )


@pytest.mark.parametrize(
    "config",
    [
        config_of("sft-rewrite"),
        config_of("dpo-rewrite-over-rollout"),
        replace(llama_1b4_from_scratch(), judge=config_of().judge, rewriter=config_of().rewriter),
        pool_config("rewrite", "rollout", rollouts=1),
        pool_config("original", "rewrite", rollouts=16),
        # At the beginning the pool is the rewrite and one rollout.
        pool_config("rewrite", "rollout", rollouts=16, curriculum="schedule", curriculum_rollout_ramp=9),
    ],
)
def test_a_useless_rewriter_stops_what_has_nothing_to_train_without_it(leader: Any, config: Config) -> None:
    with pytest.raises(SipError) as error:
        without_rewrites(JudgeWatch(config, leader), 20)
    said = str(error.value)
    assert re.search(r"answers of the rewriter service are missing over .* most often truncated", said)
    assert "--rewriter-url (http://r:2/v1), --rewriter-model, --rewriter-max-tokens" in said
    assert "candidates/missing" in said


def test_a_rewriter_behind_the_judges_url_is_named_by_its_own_flag(leader: Any) -> None:
    config = replace(config_of("sft-rewrite"), rewriter=RewriterConfig())
    with pytest.raises(SipError, match=r"--rewriter-url \(or --judge-url\) \(http://a:1/v1\)"):
        without_rewrites(JudgeWatch(config, leader), 3)


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        pool_config("rewrite", "rollout", rollouts=2),
        pool_config("original", "rewrite", "rollout", rollouts=1),
    ],
)
def test_missing_rewrites_do_not_stop_a_run_that_has_other_candidates(leader: Any, config: Config) -> None:
    assert without_rewrites(JudgeWatch(config, leader), 9).voided == []


def test_a_rewrite_is_lost_whether_it_did_not_come_or_makes_no_candidate() -> None:
    """A text that came and is too short for a candidate is not among the services' missing answers."""
    rollout, rewrite = Candidate(CandidateKind.ROLLOUT, (1,), "a"), Candidate(CandidateKind.REWRITE, (2,), "b")
    pools = [Pool(0, "", "", (rollout,)), Pool(1, "", "", (rewrite, rollout)), Pool(2, "", "", (rewrite,))]
    empty = Missing(MissingReason.EMPTY, "rollout 0 has no text")
    assert _lost_rewrites(pools, [[SHORT, empty], [], [empty]]) == [SHORT, None, None]


class Rewriting(Services):
    """Services whose rewriter is well and writes far too little."""

    def submit_rewrites(self, requests: Sequence[Any], _max_tokens: int, _spared: Any) -> Future[Any]:
        return self.done(["x"] * len(requests))

    def submit_rounds(self, begin: Callable[[Any], Any], rewrites: Future[Any], _spared: Any) -> Future[Any]:
        return self.done(ask_rounds(begin(rewrites.result()), lambda *_: pytest.fail("nobody judges")))

    def all_of(self, futures: Sequence[Future[Any]]) -> Future[Any]:
        return self.done([future.result() for future in futures])

    def done(self, result: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(result)
        return future

    def judges(self, _iteration: int) -> list[Any]:
        return []

    def waits_for(self, role: str) -> str:
        return role

    def asked_of(self) -> dict[str, dict[str, str]]:
        return {}

    def stats(self) -> dict[str, float]:
        return {}


def test_steps_whose_rewrites_are_all_too_short_end_the_run(leader: Any) -> None:
    services: Any = Rewriting()
    told: list[str] = []
    parts: dict[str, Any] = {
        "world": SimpleNamespace(tp_size=1),
        "leader": SimpleNamespace(
            **vars(leader),
            wait=lambda future, trouble: told.append(trouble()) or future.result(),
            tell=lambda batch: batch,
        ),
        "boundaries": SimpleNamespace(stage=lambda *_: nullcontext()),
        "tokenizer": SimpleNamespace(
            prefix_text=str, candidate_text=lambda _prefix, tokens: str(tokens), rewrite_tokens=lambda *_: SHORT
        ),
    }
    config = pool_config("original", "rewrite", rollouts=1)
    maker = PreferenceMaker(config, engine=None, services=services, **parts)  # type: ignore[arg-type]

    def made(number: int) -> list[Pool]:
        return maker.finish(maker.begin(cut_at(number), number)).pools

    for number in range(2):
        assert [len(pool.candidates) for pool in made(number)] == [1]
    with pytest.raises(SipError, match=r"3 of 3 answers of the rewriter service .* most often too_short"):
        made(2)
    assert services.voided == [0]
    assert told == ["rewriter", "judge"] * 3, "whose servers the waits are for"


def message(leader: Any, name: str, judge: JudgeConfig) -> str:
    """What a silent judge of this name ends the run with, after another reason had been common long before."""
    services: Any = Services()
    watch = JudgeWatch(Config(judge=judge), leader)
    watch.check(cut_at(0), services, [said_by(name, 100, timeout=40)])
    with pytest.raises(SipError) as error:
        until_it_stops(watch, services, lambda _: [said_by(name, 8, malformed=8)], 9)
    return str(error.value)


def test_the_message_names_the_judges_own_server_and_the_latest_cause(leader: Any) -> None:
    urls = {"judge_url": ("http://a:1/v1",), "judge_missing_window": 3}
    own = JudgeConfig(**urls, judge_set=("safety.weight=1", "safety.url=http://s:3/v1"))  # type: ignore[arg-type]
    said = message(leader, "safety", own)
    assert "the server of --judge-set safety.url (http://s:3/v1)" in said
    assert "http://a:1" not in said
    # 24 malformed against 40 timeouts, which have left the window.
    assert "most often malformed" in said
    assert "--judge-url (http://a:1/v1)" in message(leader, "quality", own)


def test_a_classifier_has_no_server_to_look_at(leader: Any) -> None:
    judge = JudgeConfig(judge_url=("http://a:1/v1",), classifier_weight=1.0, judge_missing_window=3)
    said = message(leader, "classifier", judge)
    assert "the candidates that --classifier profanity-check reads" in said
    assert "server" not in said
    assert "http://a:1" not in said


def test_ranks_that_are_no_leaders_only_listen(leader: Any) -> None:
    watch = JudgeWatch(config_of(), leader)
    for step in range(9):
        watch.check(cut_at(step), None, [])

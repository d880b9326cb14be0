"""`--judge-set`: settings of single judges over those for all, and the message of each wrong entry."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.config.judge_set import KINDS, JudgeSettings, active_judges, resolve_judges
from megatron_sip.config.run_config import from_yaml, to_flags, to_yaml
from megatron_sip.errors import ConfigError


def judges(*entries: str, **flat: Any) -> dict[str, JudgeSettings]:
    return {settings.name: settings for settings in resolve_judges(JudgeConfig(judge_set=entries, **flat))}


def test_without_entries_every_judge_is_as_the_flags_say() -> None:
    found = judges(
        judge_url=("http://a/v1",),
        judge_model="big",
        judge_votes=5,
        judge_temperature=0.7,
        judge_interval=3,
        likelihood_interval=2,
        safety_weight=2.0,
    )
    assert tuple(found) == KINDS
    for name, settings in found.items():
        assert (settings.url, settings.model, settings.temperature) == (("http://a/v1",), "big", 0.7)
        assert settings.kind == name
        assert settings.own == frozenset()
    assert [s.weight for s in found.values()] == [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert {name: s.interval for name, s in found.items()} == {
        **dict.fromkeys(("quality", "safety", "factuality", "reward"), 3),
        "likelihood": 2,
        "classifier": 1,
    }


def test_an_entry_is_for_one_judge_alone() -> None:
    found = judges(
        "safety.url=http://s:8100/v1, http://t:8100/v1",
        "safety.votes=5",
        "safety.top-p=0.6",
        "safety.reasoning_effort=low",
        "quality-b.kind=quality",
        "quality-b.weight=0.5",
        "quality-b.reading=logit",
        "quality-b.max-context=none",
        judge_url=("http://a/v1",),
        judge_model="big",
        judge_max_context=4096,
    )
    safety, plain, other = found["safety"], found["quality"], found["quality-b"]
    assert safety.url == ("http://s:8100/v1", "http://t:8100/v1")
    assert (safety.votes, safety.top_p, safety.reasoning_effort) == (5, 0.6, "low")
    # What was said of the model behind --judge-url says nothing of another server's.
    assert (safety.model, safety.max_context) == (None, None)
    assert (plain.url, plain.model, plain.votes, plain.max_context) == (("http://a/v1",), "big", 1, 4096)
    assert (other.kind, other.weight, other.reading, other.url) == ("quality", 0.5, "logit", ("http://a/v1",))
    assert (other.model, other.max_context, other.pairwise) == ("big", None, True)
    assert other.own == {"weight", "reading", "max_context"}
    assert list(found) == [*KINDS, "quality-b"]
    assert [s.name for s in active_judges(JudgeConfig(judge_set=("b.kind=safety", "quality.weight=0")))] == ["b"]


@pytest.mark.parametrize(
    ("reading", "order", "expected"),
    [
        ("generate", "auto", "random"),
        ("logit", "auto", "both"),
        ("logit", "random", "random"),
        ("generate", "both", "both"),
    ],
)
def test_the_option_order_follows_the_reading_unless_it_is_given(reading: str, order: str, expected: str) -> None:
    flat = judges(judge_reading=reading, judge_option_order=order)["quality"]
    own = judges(f"quality.reading={reading}", f"quality.option-order={order}")["quality"]
    assert flat.option_order == own.option_order == expected


def test_a_question_with_one_answer_is_asked_once() -> None:
    flat: dict[str, Any] = {"judge_votes": 5}
    assert judges(**flat)["quality"].votes == 5
    assert judges("quality.reading=logit", **flat)["quality"].votes == 1
    assert judges("safety.temperature=0", **flat)["safety"].votes == 1
    assert judges("safety.temperature=0", **flat)["quality"].votes == 5


def test_where_a_value_and_a_key_come_from() -> None:
    found = judges("quality-b.kind=quality", "quality-b.votes=3")["quality-b"]
    assert found.flag("votes") == "--judge-set quality-b.votes"
    assert found.flag("max_tokens") == "--judge-max-tokens"
    assert judges()["likelihood"].flag("interval") == "--likelihood-interval"
    assert judges()["reward"].flag("scale") == "--reward-scale"
    assert found.key_variables == ("QUALITY_B_JUDGE_API_KEY", "JUDGE_API_KEY")


@pytest.mark.parametrize(
    ("url", "shares"),
    [
        ("https://a/v1", True),
        ("https://a:443/other", True),
        ("http://b:8100,https://a", True),
        ("http://a/v1", False),
        ("https://a:8443/v1", False),
        ("https://c/v1", False),
        ("https://a/v1,https://c/v1", False),
        ("nowhere", False),
        ("https://a:port", False),
    ],
)
def test_the_key_for_all_goes_to_no_other_host(url: str, shares: bool) -> None:
    found = judges(f"safety.url={url}", judge_url=("https://a/v1", "http://b:8100/v1"))["safety"]
    assert found.key_variables == ("SAFETY_JUDGE_API_KEY", *(("JUDGE_API_KEY",) if shares else ()))
    assert judges(f"safety.url={url}")["safety"].key_variables == ("SAFETY_JUDGE_API_KEY",), "no --judge-url"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("safty.votes=5", ["no judge safty", "did you mean safety?", "safty.kind=KIND"]),
        ("safety.vots=5", ["kind safety has no such field", "did you mean votes?", "max-tokens"]),
        ("safety.option-order=both", ["kind safety has no such field"]),
        ("classifier.url=http://a", ["kind classifier has no such field"]),
        ("b.kind=qualty", ["b.kind=qualty", "did you mean quality?"]),
        ("safety.kind=quality", ["safety is of its own kind"]),
        ("safety.votes=many", ["safety.votes=many", "whole number"]),
        ("safety.votes=0", ["safety.votes=0", "at least 1"]),
        ("safety.weight=-1", ["at least 0"]),
        ("safety.temperature=nan", ["safety.temperature=nan", "at least 0"]),
        ("reward.scale=0", ["other than 0"]),
        ("reward.offset=inf", ["a finite number"]),
        ("safety.reading=logits", ["did you mean logit?", "generate, logit"]),
        ("safety.votes", ["NAME.FIELD=VALUE"]),
        ("safety=5", ["NAME.FIELD=VALUE"]),
        ("Safety.votes=5", ["cannot be a judge's name"]),
        ("rewriter.kind=quality", ["cannot be a judge's name"]),
        ("a--b.kind=quality", ["cannot be a judge's name"]),
        ("safety.api-key=12345678", ["SAFETY_JUDGE_API_KEY", "environment only"]),
    ],
)
def test_what_is_refused(entry: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        judges(entry)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "12345678" not in str(caught.value)


def test_an_entry_that_stands_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"safety\.top-p twice"):
        judges("safety.top-p=0.5", "safety.top_p=0.6")


def test_every_setting_for_all_chat_judges_can_be_set_for_one() -> None:
    """A new flag of the judges must be a field of `--judge-set`, or be named here as one for all."""
    known = {item.name for item in fields(JudgeSettings)}
    for_all = {"judge_set", "allow_insecure_judge", "judge_trust_env_proxy", "judge_hedge_after", "judge_failure"}
    for_all |= {"judge_max_missing_share", "judge_missing_window", "judge_ca_file", "judge_lag"}
    for_all |= {"judge_cache", "judge_cache_size_gb"}
    for item in fields(JudgeConfig):
        name = item.name.removeprefix("judge_").removeprefix("reward_")
        if item.name not in for_all and not item.name.endswith(("_weight", "likelihood_interval")):
            assert name in known, item.name


def test_entries_survive_yaml_and_flags() -> None:
    line = "--judge-set safety.url=http://s:8100/v1 quality-b.kind=quality quality-b.weight=0.5 --safety-weight 1"
    config = parse_config(line.split())
    assert from_yaml(to_yaml(config), "saved") == config
    assert parse_config(to_flags(config)) == config
    assert from_yaml("judge:\n  judge_set: [safety.votes=5]\n", "f").judge.judge_set == ("safety.votes=5",)


def test_a_key_in_a_judges_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match=r"--judge-set safety\.url http://h/v1 was given") as caught:
        parse_config(["--judge-set", "safety.url=http://user:hunter2@h/v1"])
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        judges("http://user:hunter2@h/v1")
    assert "hunter2" not in str(caught.value)
    assert parse_config([]) == Config()

"""The judges that a check asks, behind the services of training, so that what is checked is what trains."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.config.judge_set import KINDS, resolve_judges
from megatron_sip.errors import ConfigError
from megatron_sip.evaluation.judge_check import CheckedReading, Spent
from megatron_sip.evaluation.labelled import Kind
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.likelihood import LikelihoodJudge
from megatron_sip.services.prompts import VERSIONS
from megatron_sip.services.toxicity import ClassifierJudge
from megatron_sip.types import Answers, Pool, Question

ReadingName = Literal["logit", "generate", "likelihood", "reward", "profanity-check", "toxic-bilstm"]
READINGS: tuple[ReadingName, ...] = get_args(ReadingName)
CLASSIFIERS = ("profanity-check", "toxic-bilstm")
JUDGE_OF_KIND: dict[Kind, str] = {"pair": "quality", "safety": "safety", "factuality": "factuality"}
KIND_IN_WORDS: dict[Kind, str] = {
    "pair": 'pairs ("good" and "bad")',
    "safety": 'texts with the label "safe" or "unsafe"',
    "factuality": 'texts with the label "hallucination" or "no hallucination"',
}
_SET_BY_THE_CHECK = {"weight", "interval", "reading", "votes", "option_order", "classifier", "classifier_path"}


def readings_of(
    names: Sequence[ReadingName], kinds: Collection[Kind], votes: int, both_orders: bool, judge: JudgeConfig
) -> list[tuple[ReadingName, CheckedReading]]:
    """The readings that the records allow, in the order of their names.

    Raises:
        ConfigError: one of the names has no record that it could be asked about; `--judge-set` cannot be read, or sets
            what the check sets or a judge that is not asked; a judge that is asked has no server.
    """
    chosen: list[tuple[ReadingName, CheckedReading]] = []
    for name in dict.fromkeys(names):
        possible = _readings(name, votes, both_orders, judge)
        usable = [reading for reading in possible if reading.kind in kinds]
        if not usable:
            needed = " or ".join(KIND_IN_WORDS[reading.kind] for reading in possible)
            raise ConfigError(f"--readings {name} needs {needed}, and --pairs holds none; add some or leave it out")
        chosen += [(name, reading) for reading in usable]
    _check_judges(judge, chosen)
    return chosen


def _check_judges(judge: JudgeConfig, readings: Sequence[tuple[ReadingName, CheckedReading]]) -> None:
    asked = {reading.judge: name for name, reading in readings}
    for settings in resolve_judges(judge):
        if (settings.own or settings.name not in KINDS) and settings.name not in asked:
            raise ConfigError(f"--judge-set names {settings.name}, which no reading asks here; take its entries out")
        taken = sorted(settings.own & _SET_BY_THE_CHECK)
        if taken:
            field = taken[0].replace("_", "-")
            raise ConfigError(
                f"--judge-set {settings.name}.{field}: the check sets it, by --readings, --votes or --classifiers-dir; "
                "take the entry out"
            )
        if settings.name in asked and settings.served and not settings.url:
            raise ConfigError(
                f"--readings {asked[settings.name]} asks a server: give its base URL with --judge-url, or by "
                f"--judge-set {settings.name}.url"
            )


def _readings(name: ReadingName, votes: int, both_orders: bool, judge: JudgeConfig) -> list[CheckedReading]:
    """All that one name stands for."""
    if name == "reward":
        [shown] = (settings.input for settings in resolve_judges(judge) if settings.name == name)
        version = VERSIONS[f"{name}/{shown}"]
        return [
            CheckedReading(name if kind == "pair" else f"{name} on {kind}", name, kind, pairwise=False, version=version)
            for kind in JUDGE_OF_KIND
        ]
    if name == "likelihood":
        return [CheckedReading(name, name, "pair", pairwise=False, version=LikelihoodJudge.version)]
    if name in CLASSIFIERS:
        return [CheckedReading(name, "classifier", "safety", pairwise=False, version=ClassifierJudge.version)]
    times = votes if name == "generate" else 1
    suffix = f", {times} votes" if times > 1 else ""
    return [
        CheckedReading(
            f"{judge} {name}{suffix}",
            judge,
            kind,
            pairwise=kind == "pair",
            version=VERSIONS[f"{judge}/{name}"],
            votes=times,
            both_orders=both_orders,
        )
        for kind, judge in JUDGE_OF_KIND.items()
    ]


def config_for(name: ReadingName, reading: CheckedReading, judge: JudgeConfig) -> Config:
    """Settings in which this judge alone has a weight."""
    fields: dict[str, Any] = {f"{other}_weight": 0.0 for other in KINDS}
    fields[f"{reading.judge}_weight"] = 1.0
    if reading.judge == "classifier":
        fields["classifier"] = name
    elif reading.judge in JUDGE_OF_KIND.values():
        fields |= {"judge_reading": name, "judge_votes": reading.votes}
    return Config(judge=replace(judge, **fields))


class CheckedService:
    """`PreferenceServices` as a `JudgeService`."""

    def __init__(self, services: PreferenceServices) -> None:
        self._services = services

    def ask(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
        """Ask, and wait for all answers."""
        return self._services.submit_answers(pools, questions).result()

    def spent(self) -> Spent:
        """Calls and tokens since the start; a local classifier has none."""
        stats = self._services.stats()
        return Spent(
            calls=int(stats.get("judge_calls", 0)),
            prompt_tokens=int(stats.get("judge_prompt_tokens", 0)),
            answer_tokens=int(stats.get("judge_answer_tokens", 0)),
            unmetered=int(stats.get("judge_unmetered", 0)),
        )

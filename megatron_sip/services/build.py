"""Which judges and rewriter a configuration asks for, and where answers are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig
from megatron_sip.config.judge_set import CHAT_KINDS, SAFETY_KINDS, JudgeSettings, active_judges
from megatron_sip.errors import ConfigError
from megatron_sip.preference.scoring import JudgeSpec
from megatron_sip.services.cache import AnswerCache
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.judges import FactualityJudge, Judge, QualityJudge, Reading, SafetyJudge
from megatron_sip.services.likelihood import LikelihoodJudge
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.reward import RewardJudge, RewardReading
from megatron_sip.services.settings import client_settings
from megatron_sip.services.toxicity import ClassifierJudge, ToxicityModel, load_profanity_check, load_toxic_bilstm

REWRITING_OBJECTIVES = ("sft-rewrite", "dpo-rewrite-over-rollout")
SCORING_OBJECTIVES = ("online-dpo", "rf-nll")


def judge_specs(config: Config) -> list[JudgeSpec]:
    """What a scoring plan needs to know of the judges with weight above 0, in a fixed order.

    Empty for an objective that scores nothing. ConfigError where `--judge-set` cannot be read.
    """
    if config.training.objective not in SCORING_OBJECTIVES:
        return []
    return [judge_spec(settings, config.preference) for settings in active_judges(config.judge)]


def judge_spec(settings: JudgeSettings, preference: PreferenceConfig) -> JudgeSpec:
    """What a scoring plan needs to know of one judge."""
    says_the_same = settings.reading == "logit" or settings.temperature == 0
    return JudgeSpec(
        settings.name,
        pairwise=settings.pairwise,
        weight=settings.weight,
        votes=settings.votes if settings.kind in CHAT_KINDS else 1,
        both_orders=settings.pairwise and settings.option_order == "both",
        tells_safety=settings.kind in SAFETY_KINDS,
        answers="probabilities" if settings.pairwise and settings.reading == "logit" else "votes",
        repeats=1 if settings.pairwise and says_the_same else preference.adaptive_repeats,
    )


def needs_rewriter(config: Config) -> bool:
    """Whether the run asks for rewrites."""
    objective = config.training.objective
    return objective in REWRITING_OBJECTIVES or (
        objective in SCORING_OBJECTIVES and "rewrite" in config.preference.pool
    )


def build_servers(
    judges: Sequence[JudgeSettings], judge: JudgeConfig, environ: Mapping[str, str] | None = None
) -> dict[str, ModelServer]:
    """The server of each judge that has one, by the judge's name; judges with the same client share it.

    Raises:
        ConfigError: a base URL or a key that cannot be used.
    """
    variables = os.environ if environ is None else environ
    alike: dict[tuple[ClientSettings, int | None], list[JudgeSettings]] = {}
    for settings in judges:
        if settings.served:
            client = client_settings(settings, judge)
            key = tuple(name for name in client.key_variables if variables.get(name))[:1]
            same = replace(client, key_variables=key, url_flag="", model_flag="")
            alike.setdefault((same, settings.max_context), []).append(settings)
    servers: dict[str, ModelServer] = {}
    for (_, context), group in alike.items():
        chats = any(settings.kind in CHAT_KINDS or _reads_turns(settings) for settings in group)
        client = client_settings(group[0], judge)
        servers |= dict.fromkeys(
            (settings.name for settings in group), ModelServer(ServiceClient(client, environ), context, chats)
        )
    return servers


def _reads_turns(settings: JudgeSettings) -> bool:
    return settings.kind == "reward" and settings.input == "chat"


def build_judge(settings: JudgeSettings, server: ModelServer | None) -> Judge:
    """One judge; all but the classifier need a server. ConfigError where the classifier's files are missing."""
    if settings.kind == "classifier":
        return ClassifierJudge(load_classifier(settings), settings.classifier, settings.name)
    if server is None:
        raise ValueError(f"judge {settings.name} needs a server")
    if settings.kind == "likelihood":
        return LikelihoodJudge(server, settings.name)
    if settings.kind == "reward":
        reading = RewardReading(settings.input, settings.route, settings.label, settings.scale, settings.offset)
        return RewardJudge(server, reading, settings.name)
    chat_judges: dict[str, Callable[[ModelServer, Reading, str], Judge]] = {
        "quality": QualityJudge,
        "safety": SafetyJudge,
        "factuality": FactualityJudge,
    }
    return chat_judges[settings.kind](server, chat_reading(settings), settings.name)


def chat_reading(settings: JudgeSettings) -> Reading:
    """How a chat judge's verdict is asked for."""
    return Reading(
        kind=settings.reading,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
        reasoning_effort=settings.reasoning_effort,
    )


def load_classifier(settings: JudgeSettings) -> ToxicityModel:
    """A judge's classifier. ConfigError where its files are missing."""
    if settings.classifier == "profanity-check":
        return load_profanity_check()
    if settings.classifier_path is None:
        raise ConfigError(
            f"{settings.flag('classifier')} toxic-bilstm needs {settings.flag('classifier_path')}, the folder of its "
            "weights and tokenizer; `python tools/get_demo_data.py` fetches them"
        )
    return load_toxic_bilstm(settings.classifier_path)


def open_cache(judge: JudgeConfig) -> AnswerCache | None:
    """The cache of --judge-cache; None without it. ConfigError where it cannot be used."""
    if judge.judge_cache is None:
        return None
    return AnswerCache(Path(judge.judge_cache), int(judge.judge_cache_size_gb * 1e9))

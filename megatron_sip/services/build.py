"""Which judges and rewriter a configuration asks for, and how their servers are reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.errors import ConfigError
from megatron_sip.preference.scoring import JudgeSpec
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.judges import FactualityJudge, Judge, QualityJudge, Reading, SafetyJudge
from megatron_sip.services.likelihood import LikelihoodJudge
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.toxicity import ClassifierJudge, ToxicityModel, load_profanity_check, load_toxic_bilstm

CHAT_JUDGES = ("quality", "safety", "factuality")
REWRITING_OBJECTIVES = ("sft-rewrite", "dpo-rewrite-over-rollout")
SCORING_OBJECTIVES = ("online-dpo", "rf-nll")


def judge_specs(config: Config) -> list[JudgeSpec]:
    """What a scoring plan needs to know of the judges with weight above 0, in a fixed order.

    A logit verdict is asked once in each option order; a generated one `judge_votes` times. Empty for an objective
    that scores nothing.
    """
    judge = config.judge
    if config.training.objective not in SCORING_OBJECTIVES:
        return []
    logit = judge.judge_reading == "logit"
    votes = 1 if logit else judge.judge_votes
    specs = [
        JudgeSpec("quality", pairwise=True, weight=judge.quality_weight, votes=votes, both_orders=logit),
        JudgeSpec("safety", pairwise=False, weight=judge.safety_weight, votes=votes),
        JudgeSpec("factuality", pairwise=False, weight=judge.factuality_weight, votes=votes),
        JudgeSpec("likelihood", pairwise=False, weight=judge.likelihood_weight),
        JudgeSpec("classifier", pairwise=False, weight=judge.classifier_weight),
    ]
    return [spec for spec in specs if spec.weight > 0]


def judge_intervals(judge: JudgeConfig) -> dict[str, int]:
    """Iterations between two uses of each judge; one that is not named is used in all of them."""
    return {**dict.fromkeys(CHAT_JUDGES, judge.judge_interval), "likelihood": judge.likelihood_interval}


def needs_rewriter(config: Config) -> bool:
    """Whether the run asks for rewrites."""
    objective = config.training.objective
    return objective in REWRITING_OBJECTIVES or (
        objective in SCORING_OBJECTIVES and "rewrite" in config.preference.pool
    )


def judge_settings(judge: JudgeConfig) -> ClientSettings:
    """The judge's client settings."""
    return ClientSettings(
        urls=judge.judge_url,
        model=judge.judge_model,
        key_variables=("JUDGE_API_KEY",),
        concurrency=judge.judge_concurrency,
        timeout=judge.judge_timeout,
        retries=judge.judge_retries,
        allow_insecure=judge.allow_insecure_judge,
        trust_env_proxy=judge.judge_trust_env_proxy,
        hedge_after=judge.judge_hedge_after,
        on_outage=judge.judge_failure,
        ca_file=judge.judge_ca_file,
    )


def rewriter_settings(config: Config) -> ClientSettings:
    """The rewriter's client settings; its servers and model default to the judge's."""
    own = bool(config.rewriter.rewriter_url)
    shared = judge_settings(config.judge)
    return replace(
        shared,
        urls=config.rewriter.rewriter_url or shared.urls,
        model=config.rewriter.rewriter_model or (None if own else shared.model),
        key_variables=("REWRITER_API_KEY", "JUDGE_API_KEY"),
        url_flag="--rewriter-url" if own else "--rewriter-url (or --judge-url)",
        model_flag="--rewriter-model",
    )


def build_judge(name: str, judge: JudgeConfig, server: ModelServer | None) -> Judge:
    """The judge called `name`; all but the classifier need a server."""
    if name == "classifier":
        return ClassifierJudge(load_classifier(judge), judge.classifier)
    if server is None:
        raise ValueError(f"judge {name} needs a server")
    if name == "likelihood":
        return LikelihoodJudge(server)
    reading = Reading(
        kind=judge.judge_reading,
        temperature=judge.judge_temperature,
        top_p=judge.judge_top_p,
        max_tokens=judge.judge_max_tokens,
        reasoning_effort=judge.judge_reasoning_effort,
    )
    chat_judges: dict[str, Callable[[ModelServer, Reading], Judge]] = {
        "quality": QualityJudge,
        "safety": SafetyJudge,
        "factuality": FactualityJudge,
    }
    return chat_judges[name](server, reading)


def load_classifier(judge: JudgeConfig) -> ToxicityModel:
    """The classifier of --classifier. ConfigError where its files are missing."""
    if judge.classifier == "profanity-check":
        return load_profanity_check()
    if judge.classifier_path is None:
        raise ConfigError(
            "--classifier toxic-bilstm needs --classifier-path, the folder of its weights and tokenizer; "
            "`python tools/get_demo_data.py` fetches them"
        )
    return load_toxic_bilstm(judge.classifier_path)

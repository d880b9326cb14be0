"""How the servers that a configuration names are reached: of judges, of the rewriter, of rollouts."""

from __future__ import annotations

from dataclasses import replace

from megatron_sip.config.groups import Config, JudgeConfig, RolloutConfig
from megatron_sip.config.judge_set import JudgeSettings, on_hosts_of
from megatron_sip.services.endpoint import ClientSettings


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


def client_settings(settings: JudgeSettings, judge: JudgeConfig) -> ClientSettings:
    """The client settings of one judge; `judge` holds what is the same for all."""
    return replace(
        judge_settings(judge),
        urls=settings.url,
        model=settings.model,
        key_variables=settings.key_variables,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        url_flag=settings.flag("url"),
        model_flag=settings.flag("model") if "url" not in settings.own else f"--judge-set {settings.name}.model",
    )


def rewriter_settings(config: Config) -> ClientSettings:
    """The rewriter's client settings; its servers and model default to the judge's, and on their hosts its key does."""
    own = bool(config.rewriter.rewriter_url)
    shared = judge_settings(config.judge)
    urls = config.rewriter.rewriter_url or shared.urls
    return replace(
        shared,
        urls=urls,
        model=config.rewriter.rewriter_model or (None if own else shared.model),
        key_variables=("REWRITER_API_KEY", *(shared.key_variables if on_hosts_of(urls, shared.urls) else ())),
        url_flag="--rewriter-url" if own else "--rewriter-url (or --judge-url)",
        model_flag="--rewriter-model",
    )


def rollout_settings(rollout: RolloutConfig) -> ClientSettings:
    """The client settings of all rollout servers.

    A failed call is a `Missing`: what comes of it is decided in `rollout/fleet.py`.
    """
    return ClientSettings(
        urls=rollout.rollout_url,
        model=rollout.rollout_model,
        key_variables=("ROLLOUT_API_KEY",),
        concurrency=rollout.rollout_concurrency,
        timeout=rollout.rollout_timeout,
        retries=rollout.rollout_retries,
        allow_insecure=rollout.allow_insecure_rollout,
        on_outage="skip",
        url_flag="--rollout-url",
        model_flag="--rollout-model",
        insecure_flag="--allow-insecure-rollout",
    )

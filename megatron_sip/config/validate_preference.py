"""Pools, judges and servers: whether an objective can make a pair of what the settings give it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sip.config.groups import Config
from megatron_sip.errors import ConfigError
from megatron_sip.preference.select import needs_scores
from megatron_sip.services.build import judge_intervals, judge_settings, judge_specs, needs_rewriter, rewriter_settings
from megatron_sip.services.endpoint import ClientSettings, parse_endpoints

_WEIGHTS = "--quality-weight, --safety-weight, --factuality-weight, --likelihood-weight or --classifier-weight"


def preference_problems(config: Config) -> list[str]:
    """A sentence for each relation among pool, objective, judges and rewriter that cannot train."""
    problems = []
    if needs_scores(config.training.objective):
        problems += [*_pool(config), *_scoring(config), *_judges(config)]
    if needs_rewriter(config):
        problems += [*_server(rewriter_settings(config)), *_rewrites(config)]
    return problems


def _candidates(config: Config, rollouts: int, rewrite: bool) -> int:
    """Candidates of one prefix with so many rollouts, with or without the rewrite."""
    pool = set(config.preference.pool)
    counts = {"original": 1, "rewrite": int(rewrite), "rollout": rollouts}
    return sum(counts[kind] for kind in pool)


def _fewest_rollouts(config: Config) -> int:
    """Rollouts of one prefix at the beginning of the curriculum, or all of them without one."""
    preference = config.preference
    if preference.curriculum == "none":
        return config.rollout.num_rollouts
    if preference.curriculum_rollout_start:
        return 0
    return 1 if preference.curriculum_rollout_ramp else config.rollout.num_rollouts


def _pool(config: Config) -> Iterator[str]:
    preference, count = config.preference, config.rollout.num_rollouts
    pool = " ".join(preference.pool)
    if len(set(preference.pool)) != len(preference.pool):
        yield f"--pool {pool} names a kind twice; name each once"
    if _candidates(config, count, rewrite=True) < 2:
        yield (
            f"--objective {config.training.objective} compares at least two candidates, but --pool {pool or '(empty)'} "
            f"with --num-rollouts {count} has {_candidates(config, count, rewrite=True)}; add a kind or raise K"
        )
        return
    fewest, interval = _fewest_rollouts(config), config.rewriter.rewrite_interval
    if _candidates(config, fewest, rewrite=True) < 2:
        yield (
            f"--curriculum schedule begins with {fewest} rollouts, and then --pool {pool} has fewer than two "
            "candidates; add original or rewrite to --pool, or lower --curriculum-rollout-start and -ramp"
        )
    elif interval > 1 and _candidates(config, count, rewrite=False) < 2:
        yield (
            f"--rewrite-interval {interval} leaves --pool {pool} with fewer than two candidates in the iterations "
            "between; set it to 1 or add rollouts to --pool"
        )
    elif interval > 1 and _candidates(config, fewest, rewrite=False) < 2:
        yield (
            f"--rewrite-interval {interval} leaves --pool {pool} with fewer than two candidates in iterations between "
            f"at the beginning, where --curriculum schedule writes {fewest} rollouts; set --rewrite-interval 1, or "
            "lower --curriculum-rollout-start and -ramp"
        )
    if "rollout" in preference.pool and config.rollout.temperature == 0 and count > 1:
        yield (
            f"--temperature 0 writes the same rollout --num-rollouts {count} times; raise the temperature or set "
            "--num-rollouts 1"
        )


def _scoring(config: Config) -> Iterator[str]:
    budget = config.preference.adaptive_budget
    most = _candidates(config, config.rollout.num_rollouts, rewrite=True)
    if config.preference.scoring == "adaptive" and budget is not None and budget < most:
        yield (
            f"--adaptive-budget {budget} is less than the {most} candidates of a prefix, so that some would hardly be "
            f"compared; give at least {most}, or leave it out for 8 calls a candidate"
        )


def _judges(config: Config) -> Iterator[str]:
    judge = config.judge
    names = [spec.name for spec in judge_specs(config)]
    if not names:
        yield (
            f"--objective {config.training.objective} needs a judge, but every weight is 0; raise {_WEIGHTS}, or "
            "choose an --objective without a judge (ntp, sft-rewrite, sft-rollout, dpo-rewrite-over-rollout)"
        )
    served = [name for name in names if name != "classifier"]
    if served and not judge.judge_url:
        yield (
            f"--judge-url is missing, which the judges of weight above 0 ({', '.join(served)}) need; give a base URL "
            "such as http://127.0.0.1:8100/v1, or set their weights to 0 and use --classifier-weight"
        )
    elif served:
        yield from _server(judge_settings(judge))
    intervals = judge_intervals(judge)
    if names and all(intervals.get(name, 1) > 1 for name in names):
        yield (
            f"--judge-interval {judge.judge_interval} and --likelihood-interval {judge.likelihood_interval} leave no "
            "judge in the iterations between; set one of them to 1, or give --classifier-weight a value above 0"
        )
    if judge.judge_reading == "logit" and judge.judge_votes > 1:
        yield (
            f"--judge-votes {judge.judge_votes} has no meaning with --judge-reading logit, which reads a probability; "
            "set --judge-votes 1 or say --judge-reading generate"
        )
    if "classifier" in names and judge.classifier == "toxic-bilstm":
        if judge.classifier_path is None:
            yield "--classifier toxic-bilstm needs --classifier-path, the folder of its weights and tokenizer"
        elif not Path(judge.classifier_path).is_dir():
            yield f"--classifier-path {judge.classifier_path} is no folder; `python tools/get_demo_data.py` fetches it"


def _server(settings: ClientSettings) -> Iterator[str]:
    try:
        parse_endpoints(settings)
    except ConfigError as error:
        yield str(error)


def _rewrites(config: Config) -> Iterator[str]:
    if not needs_scores(config.training.objective) and config.rewriter.rewrite_interval > 1:
        yield (
            f"--objective {config.training.objective} trains on rewrites alone, but --rewrite-interval "
            f"{config.rewriter.rewrite_interval} fetches none in between; set it to 1"
        )

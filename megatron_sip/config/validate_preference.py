"""Pools, judges and servers: whether an objective can make a pair of what the settings give it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sip.config.groups import Config
from megatron_sip.config.validate_judges import judge_problems, judge_set_problems
from megatron_sip.errors import ConfigError
from megatron_sip.preference.select import needs_scores
from megatron_sip.services.build import REWRITING_OBJECTIVES, needs_rewriter
from megatron_sip.services.endpoint import ClientSettings, parse_endpoints
from megatron_sip.services.settings import rewriter_settings


def preference_problems(config: Config) -> list[str]:
    """A sentence for each relation among pool, objective, judges and rewriter that cannot train."""
    problems = []
    if needs_scores(config.training.objective):
        problems += [*_pool(config), *_scoring(config), *judge_problems(config)]
    else:
        problems += judge_set_problems(config)
    if needs_rewriter(config):
        problems += [*_server(rewriter_settings(config)), *_rewrites(config)]
    return problems


def lives_on_rewrites(config: Config) -> bool:
    """Whether a step can have nothing to train because its rewrites are missing, at the beginning of the run or later.

    So it is where the objective trains on rewrites, and where the pool without one can be too small to compare.
    """
    if needs_scores(config.training.objective) and "rewrite" in config.preference.pool:
        return _candidates(config, _fewest_rollouts(config), rewrite=False) < 2
    return config.training.objective in REWRITING_OBJECTIVES


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

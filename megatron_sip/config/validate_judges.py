"""Judges: whether the settings leave somebody to ask, everywhere and in every iteration, and make sense for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_sip.config.groups import Config, JudgeConfig
from megatron_sip.config.judge_set import CHAT_KINDS, KINDS, SAFETY_KINDS, JudgeSettings, resolve_judges
from megatron_sip.errors import ConfigError
from megatron_sip.services.endpoint import parse_endpoints
from megatron_sip.services.settings import client_settings

_WEIGHTS = ", ".join(f"--{kind}-weight" for kind in KINDS[:-1]) + f" or --{KINDS[-1]}-weight"


def judge_problems(config: Config) -> Iterator[str]:
    """A sentence for each setting of a judge that cannot be meant, for an objective that asks judges."""
    try:
        judges = resolve_judges(config.judge)
    except ConfigError as error:
        yield str(error)
        return
    active = [settings for settings in judges if settings.weight > 0]
    if not active:
        yield (
            f"--objective {config.training.objective} needs a judge, but every weight is 0; raise {_WEIGHTS}, or "
            "choose an --objective without a judge (ntp, sft-rewrite, sft-rollout, dpo-rewrite-over-rollout)"
        )
    yield from _weightless(judges)
    yield from _servers(active, config.judge)
    yield from _calls(active, config.judge)
    yield from _intervals(active, config.judge)
    yield from vote_problems(active, config.judge)
    for settings in active:
        yield from _single(settings)
    yield from _screens(active, config)


def judge_set_problems(config: Config) -> list[str]:
    """What is wrong with `--judge-set`, for an objective that asks no judge."""
    try:
        resolve_judges(config.judge)
    except ConfigError as error:
        return [str(error)]
    return []


def _weightless(judges: Sequence[JudgeSettings]) -> Iterator[str]:
    for settings in judges:
        if settings.own and settings.weight == 0:
            yield (
                f"--judge-set names {settings.name}, whose weight is 0, so it is never asked; give it a "
                f"{settings.name}.weight above 0, or take its entries out"
            )


def _servers(active: Sequence[JudgeSettings], judge: JudgeConfig) -> Iterator[str]:
    homeless = [settings.name for settings in active if settings.served and not settings.url]
    if homeless:
        yield (
            f"--judge-url is missing, which the judges of weight above 0 ({', '.join(homeless)}) need; give a base URL "
            "such as http://127.0.0.1:8100/v1, or set their weights to 0 and use --classifier-weight"
        )
    told: set[str] = set()
    for settings in active:
        if settings.served and settings.url:
            try:
                parse_endpoints(client_settings(settings, judge))
            except ConfigError as error:
                if str(error) not in told:
                    yield str(error)
                told.add(str(error))


def _calls(active: Sequence[JudgeSettings], judge: JudgeConfig) -> Iterator[str]:
    """Limits of a call that contradict one another, and a file that is not there."""
    hedge, served = judge.judge_hedge_after, [settings for settings in active if settings.served]
    for settings in served:
        if hedge is not None and hedge >= settings.timeout:
            yield (
                f"--judge-hedge-after {hedge:g} comes behind the deadline of every call, {settings.flag('timeout')} "
                f"{settings.timeout:g}; set it to about the slowest twentieth of the answer times"
            )
            break
    if served and judge.judge_ca_file is not None and not Path(judge.judge_ca_file).is_file():
        yield f"--judge-ca-file {judge.judge_ca_file} is no file; name one in PEM form"


def _intervals(active: Sequence[JudgeSettings], judge: JudgeConfig) -> Iterator[str]:
    if active and all(settings.interval > 1 for settings in active):
        of_own = ", ".join(settings.flag("interval") for settings in active if "interval" in settings.own)
        yield (
            f"--judge-interval {judge.judge_interval} and --likelihood-interval {judge.likelihood_interval} leave no "
            f"judge in the iterations between; set one of them {f'(or {of_own}) ' if of_own else ''}to 1, or give "
            "--classifier-weight a value above 0"
        )


def vote_problems(active: Sequence[JudgeSettings], judge: JudgeConfig) -> Iterator[str]:
    """Several votes on a question that is always answered the same."""
    chats = [settings for settings in active if settings.kind in CHAT_KINDS]
    for settings in chats:
        if "votes" in settings.own and settings.wanted_votes > settings.votes:
            yield f"{settings.flag('votes')} {settings.wanted_votes} {_why_one(settings)}"
    sharing = [settings for settings in chats if "votes" not in settings.own]
    if sharing and all(settings.wanted_votes > settings.votes for settings in sharing):
        yield f"--judge-votes {judge.judge_votes} {_why_one(sharing[0])}"


def _why_one(settings: JudgeSettings) -> str:
    """Why one vote is all there is to have, and the way out."""
    votes, reading = settings.flag("votes"), settings.flag("reading")
    if settings.reading == "logit":
        return (
            f"has no meaning with {reading} logit, which reads a probability; set {votes} 1 or say {reading} generate"
        )
    temperature = settings.flag("temperature")
    return f"at {temperature} 0 would ask the same question for the same answer; set {votes} 1 or raise {temperature}"


def _single(settings: JudgeSettings) -> Iterator[str]:
    if settings.kind == "classifier" and settings.classifier == "toxic-bilstm":
        path = settings.flag("classifier_path")
        if settings.classifier_path is None:
            yield (f"{settings.flag('classifier')} toxic-bilstm needs {path}, the folder of its weights and tokenizer")
        elif not Path(settings.classifier_path).is_dir():
            yield f"{path} {settings.classifier_path} is no folder; `python tools/get_demo_data.py` fetches it"
    if settings.kind == "reward" and settings.route == "score" and settings.input == "chat":
        yield (
            f"{settings.flag('input')} chat cannot go to {settings.flag('route')} score, which takes two texts; use "
            f"{settings.flag('route')} classify, or {settings.flag('input')} text"
        )


def _screens(active: Sequence[JudgeSettings], config: Config) -> Iterator[str]:
    safety, repetition = config.preference.screen_safety_below, config.preference.screen_repetition_above
    given = {"--screen-safety-below": safety, "--screen-repetition-above": repetition}
    for flag, value in given.items():
        if value is not None and active and not any(settings.pairwise for settings in active):
            yield f"{flag} {value} spares comparisons, but no judge of weight above 0 compares; leave it out"
    telling = [settings for settings in active if settings.kind in SAFETY_KINDS]
    if safety is not None and not telling:
        yield (
            f"--screen-safety-below {safety} goes by a judge of safety; raise --safety-weight or --classifier-weight, "
            "or leave it out"
        )
    elif safety is not None:
        yield from _blind(safety, [settings for settings in active if settings.pairwise], telling)


def _blind(safety: float, comparing: Sequence[JudgeSettings], telling: Sequence[JudgeSettings]) -> Iterator[str]:
    """A screen by safety in iterations that compare, in which nobody who tells safety is asked."""
    for judge in comparing:
        # The iterations of `judge` are all among those of another exactly where that one's interval divides its own.
        if all(judge.interval % other.interval for other in telling):
            intervals = " and ".join(f"{other.flag('interval')} {other.interval}" for other in telling)
            yield (
                f"--screen-safety-below {safety} stops nobody in the iterations in which {judge.name} compares (every "
                f"{judge.interval}) and no judge of safety is asked ({intervals}); let one of them divide "
                f"{judge.interval}, or give --classifier-weight a value above 0"
            )
            return

"""`--stage-timeout`: how long each stage of a run may go on without progress."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sip.errors import ConfigError

STAGES = ("assemble", "load", "data", "rollout", "rewrite", "judge", "train", "optimizer", "report", "save")
"""The stages that a rank can be in; what lies between two of them counts as the one before."""


def stage_timeouts(texts: Sequence[str]) -> dict[str, float]:
    """Seconds by stage of `("480", "save=1800")`: a bare number is meant for all stages that are not named.

    Raises:
        ConfigError: an unknown stage, no positive number, or a stage without any.
    """
    general: float | None = None
    named: dict[str, float] = {}
    for text in texts:
        stage, separator, number = text.rpartition("=")
        if separator and stage not in STAGES:
            raise ConfigError(
                f"--stage-timeout {text}: there is no stage {stage!r}; the stages are {', '.join(STAGES)}"
            )
        seconds = _seconds(number, text)
        if separator:
            named[stage] = seconds
        else:
            general = seconds
    missing = [stage for stage in STAGES if stage not in named]
    if general is None and missing:
        raise ConfigError(
            f"--stage-timeout gives no seconds for {', '.join(missing)}; add a number without a name for all others"
        )
    return {stage: named.get(stage, general or 0.0) for stage in STAGES}


def _seconds(number: str, text: str) -> float:
    try:
        seconds = float(number)
    except ValueError:
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--stage-timeout {text}: give seconds above 0, as in 480 or save=1800")
    return seconds

"""`--stage-timeout`: seconds for all stages and for single ones."""

from __future__ import annotations

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.timeouts import STAGES, stage_timeouts
from megatron_sip.config.validate import validate
from megatron_sip.errors import ConfigError


def test_a_number_is_for_all_and_a_name_for_one() -> None:
    limits = stage_timeouts(("480", "save=1800.5"))
    assert limits == {**dict.fromkeys(STAGES, 480.0), "save": 1800.5}
    assert stage_timeouts(tuple(f"{stage}=5" for stage in STAGES)) == dict.fromkeys(STAGES, 5.0)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("480", "rolout=5"), "there is no stage 'rolout'; the stages are assemble, load"),
        (("soon",), "--stage-timeout soon: give seconds above 0"),
        (("0",), "give seconds above 0"),
        (("480", "save=-1"), "--stage-timeout save=-1: give seconds above 0"),
        (("nan",), "give seconds above 0"),
        (("inf",), "give seconds above 0"),
        (("save=5",), "no seconds for assemble, load, data"),
        ((), "no seconds for assemble"),
    ],
)
def test_what_is_refused(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        stage_timeouts(texts)
    assert message in str(caught.value)


def test_the_collectives_must_not_be_faster() -> None:
    flags = "--model-preset llama-tiny --data-path c --tokenizer-model t --objective ntp".split()
    validate(parse_config(flags), 1)
    validate(parse_config([*flags, "--stage-timeout", "599", "save=6000"]), 1)
    with pytest.raises(ConfigError, match=r"--stage-timeout train=600 is no less than --distributed-timeout-minutes"):
        validate(parse_config([*flags, "--stage-timeout", "500", "train=600"]), 1)
    validate(parse_config([*flags, "--stage-timeout", "600", "--distributed-timeout-minutes", "11"]), 1)

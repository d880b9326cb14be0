"""`--stage-timeout`: seconds for all stages and for single ones."""

from __future__ import annotations

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.config.timeouts import STAGES, stage_timeouts
from megatron_sip.config.validate import validate
from megatron_sip.errors import ConfigError
from megatron_sip.parallel.world import group_timeout


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


def test_no_collective_is_faster_than_a_stage() -> None:
    flags = "--model-preset llama-tiny --data-path c --tokenizer-model t --objective ntp".split()
    config = parse_config([*flags, "--stage-timeout", "500", "load=7200", "--distributed-timeout-minutes", "11"])
    validate(config, 1)
    assert group_timeout(config).total_seconds() == 7260
    assert group_timeout(parse_config([*flags, "--stage-timeout", "5"])).total_seconds() == 600

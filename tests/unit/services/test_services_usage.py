from __future__ import annotations

import pytest

from megatron_sip.services.usage import Usage
from megatron_sip.types import Missing, MissingReason


def test_tokens_are_summed() -> None:
    usage = Usage()
    usage.add({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
    usage.add({"data": [], "usage": {"prompt_tokens": 5, "completion_tokens": None}})
    usage.add({"data": [], "usage": {"prompt_tokens": 1}})
    usage.add({"count": 3, "tokens": [1, 2, 3]})
    usage.add(Missing(MissingReason.TIMEOUT))
    assert usage == Usage(13, 2, 0)


@pytest.mark.parametrize(
    "told",
    [None, [], {}, {"prompt_tokens": "7"}, {"prompt_tokens": True}, {"prompt_tokens": -1}, {"prompt_tokens": 1.5}],
)
def test_what_is_no_count_is_counted_as_untold(told: object) -> None:
    usage = Usage()
    usage.add({"choices": [], "usage": told})
    usage.add({"choices": []})
    assert usage == Usage(0, 0, 2)

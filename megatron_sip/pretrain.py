"""Entry: `torchrun ... -m megatron_sip.pretrain FLAGS`. The algorithm itself is `megatron_sip.training.loop`.

Settings are parsed and checked before megatron-core is imported, so that `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from megatron_sip.config.cli import parse_config
from megatron_sip.config.validate import validate
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.parallel.ending import FAILED, REFUSED, end_now, leave


def launched_world_size() -> int:
    """Number of ranks that torchrun started; 1 without torchrun.

    Raises:
        ConfigError: WORLD_SIZE is not a number.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit():
        raise ConfigError(f"the environment variable WORLD_SIZE is {text!r}, not a number; start with torchrun")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, train; returns the exit status. What the user can mend is one line, once."""
    try:
        config = parse_config(sys.argv[1:] if argv is None else argv)
        validate(config, launched_world_size())
    except SipError as error:
        # Every rank meets the same error; one message is enough.
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron_sip: error: {error}", file=sys.stderr, flush=True)
        return REFUSED
    # megatron-core says once an import that Transformer Engine and apex are absent.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    from megatron_sip.training.loop import pretrain

    try:
        pretrain(config)
    except SipError:
        return leave(REFUSED)  # told by pretrain, on one rank
    except BaseException:
        end_now(FAILED)  # told as well; process groups and libraries are in an unknown state
    return leave(0)


if __name__ == "__main__":
    sys.exit(main())

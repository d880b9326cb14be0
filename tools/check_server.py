"""Ask a judge or rewriter server what it serves, before a run depends on it.

    python tools/check_server.py --judge-url http://127.0.0.1:8100/v1 [--judge-model NAME]

Exit status 0 and one line where all servers answer; else 1 and the cause. The key comes from JUDGE_API_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_sip.config.groups import JudgeConfig
from megatron_sip.errors import SipError
from megatron_sip.services.client import ServerInfo, ServiceClient
from megatron_sip.services.settings import judge_settings


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge-url", nargs="+", required=True, help="base URLs, each ending in /v1")
    parser.add_argument("--judge-model", help="model that must be served (default: the only one)")
    parser.add_argument("--allow-insecure-judge", action="store_true", help="send a key over plain http")
    return parser


async def check(judge: JudgeConfig) -> ServerInfo:
    """What all the servers serve. Raises ServiceError with the way out."""
    client = ServiceClient(judge_settings(judge))
    await client.open()
    try:
        return await client.check()
    finally:
        await client.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    judge = JudgeConfig(
        judge_url=tuple(args.judge_url),
        judge_model=args.judge_model,
        allow_insecure_judge=args.allow_insecure_judge,
    )
    try:
        info = asyncio.run(check(judge))
    except SipError as error:
        print(f"check_server: {error}", file=sys.stderr)
        return 1
    context = f", context {info.max_model_len} tokens" if info.max_model_len else ""
    print(f"{' '.join(args.judge_url)} serves {info.model}{context}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

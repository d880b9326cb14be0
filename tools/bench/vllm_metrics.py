"""What a vLLM server counts about itself: the Prometheus counters of /metrics. Pure but for `fetch`."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from dataclasses import dataclass

from megatron_sip.errors import ServiceError

_SAMPLE = re.compile(r"^(vllm:[a-z_]+)(?:\{[^}]*\})? ([-+.eE\d]+)$", re.MULTILINE)
_LARGEST = 10_000_000


@dataclass(frozen=True)
class ServerCounters:
    """Tokens since the server's start, summed over its engines.

    `queried` and `hit` are prompt tokens that were looked up in the prefix cache and found there; requests for
    log-probabilities of the prompt are not looked up. `prompt` counts all prompt tokens, found or computed, and
    `answer` the tokens that were written.
    """

    queried: float
    hit: float
    prompt: float
    answer: float

    def since(self, before: ServerCounters) -> ServerCounters:
        """What was counted between `before` and this."""
        return ServerCounters(
            self.queried - before.queried,
            self.hit - before.hit,
            self.prompt - before.prompt,
            self.answer - before.answer,
        )

    @property
    def hit_rate(self) -> float | None:
        """Share of the tokens looked up that were found; None where none was looked up."""
        return self.hit / self.queried if self.queried > 0 else None


def parse(text: str) -> ServerCounters:
    """The counters in a page of /metrics.

    Raises:
        ServiceError: one of them is not there, as with a server that is no vLLM.
    """
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)

    def total(name: str) -> float:
        if f"vllm:{name}_total" not in sums:
            raise ServiceError(f"/metrics has no vllm:{name}_total; only a vLLM server counts its prefix cache")
        return sums[f"vllm:{name}_total"]

    return ServerCounters(
        queried=total("prefix_cache_queries"),
        hit=total("prefix_cache_hits"),
        prompt=total("prompt_tokens"),
        answer=total("generation_tokens"),
    )


def fetch(base_url: str) -> ServerCounters:
    """The counters of the server at `base_url` (with or without /v1). Proxies of the environment are not used.

    Raises:
        ServiceError: the page is not there, or has no such counters.
    """
    url = base_url.rstrip("/").removesuffix("/v1") + "/metrics"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=20) as answer:
            text = answer.read(_LARGEST).decode("utf-8", "replace")
    except (OSError, urllib.error.URLError) as error:
        raise ServiceError(f"{url} cannot be read ({error}); name a vLLM server that is up") from error
    return parse(text)

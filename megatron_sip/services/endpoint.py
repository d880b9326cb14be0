"""Where a service lives and how it is reached: settings, addresses, certificates and the key."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from megatron_sip.config.fields import without_secrets
from megatron_sip.errors import ConfigError
from megatron_sip.services.circuit import Endpoint

OnOutage = Literal["skip", "wait", "stop"]


class Secret:
    """An API key that shows itself to nobody by accident."""

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The key itself, for the request header only."""
        return self._value

    def hide_in(self, text: str) -> str:
        """`text` without the key (a server may echo it in an error)."""
        return text.replace(self._value, "***")

    def __repr__(self) -> str:
        return "Secret(***)"


@dataclass(frozen=True)
class ClientSettings:
    """One service: its servers and the limits of a call.

    `key_variables` are environment variables in order of preference. `url_flag`, `model_flag` and `insecure_flag` only
    serve messages. `timeout` is in seconds and holds for a call as a whole, retries and pauses included. `hedge_after`
    are seconds without an answer after which a second copy of the call is sent. `on_outage` tells what becomes of calls
    while no server answers: they are missing, they wait for a server, or they raise. Calls that wait do so outside
    `timeout`, also while all servers ask to be left alone.
    """

    urls: tuple[str, ...]
    model: str | None = None
    key_variables: tuple[str, ...] = ("JUDGE_API_KEY",)
    concurrency: int = 64
    timeout: float = 120.0
    retries: int = 3
    allow_insecure: bool = False
    trust_env_proxy: bool = False
    hedge_after: float | None = None
    on_outage: OnOutage = "skip"
    ca_file: str | None = None
    url_flag: str = "--judge-url"
    model_flag: str = "--judge-model"
    insecure_flag: str = "--allow-insecure-judge"


def parse_endpoints(settings: ClientSettings) -> list[Endpoint]:
    """Check the base URLs. ConfigError for one that is no http(s) URL, holds a password or a query, or stands twice."""
    if not settings.urls:
        raise ConfigError(f"no server is given; set {settings.url_flag} to a base URL such as http://127.0.0.1:8100/v1")
    endpoints = [_endpoint(url.strip(), settings) for url in settings.urls]
    twice = next((base for base, count in Counter(e.base for e in endpoints).items() if count > 1), None)
    if twice is not None:  # what is known of a server, such as who looks after it, goes by its address
        raise ConfigError(f"{settings.url_flag} names {twice} more than once; name each server once")
    return endpoints


def _endpoint(url: str, settings: ClientSettings) -> Endpoint:
    """One checked base URL."""
    if without_secrets(url) != url:
        raise ConfigError(
            f"{settings.url_flag} {without_secrets(url)} must hold no user, password, query or fragment; "
            f"a key goes into the environment variable {settings.key_variables[0]}"
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a bracket that does not close, or a port that is no number
        usable = False
    if not usable:
        raise ConfigError(f"{settings.url_flag} {url!r} is no http or https URL, such as http://127.0.0.1:8100/v1")
    base = url.rstrip("/")
    if not parts.path.rstrip("/"):
        base += "/v1"
    return Endpoint(base=base, root=base.removesuffix("/v1"))


def tls_context(settings: ClientSettings) -> ssl.SSLContext:
    """What certificates are checked by: the system's authorities (or SSL_CERT_FILE's), and those of `ca_file`.

    Raises:
        ConfigError: the file cannot be read or holds no certificate.
    """
    context = ssl.create_default_context()
    if settings.ca_file is not None:
        try:
            context.load_verify_locations(settings.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"--judge-ca-file {settings.ca_file} holds no certificates ({error}); name a file in PEM form"
            ) from error
    return context


def read_key(settings: ClientSettings, environ: Mapping[str, str] | None = None) -> Secret | None:
    """The key from the environment, or None.

    ConfigError if it is no single printable word, or if it would travel over plain http to another host.
    """
    variables = os.environ if environ is None else environ
    name = next((name for name in settings.key_variables if variables.get(name)), None)
    if name is None:
        return None
    value = variables[name].strip()
    if not value or not value.isascii() or not value.isprintable() or " " in value:
        raise ConfigError(f"the environment variable {name} holds no usable key (one printable ASCII word)")
    for url in settings.urls:
        if urlsplit(url).scheme == "http" and not is_loopback(urlsplit(url).hostname) and not settings.allow_insecure:
            raise ConfigError(
                f"{settings.url_flag} {url} would send the key of {name} over plain http to another host; "
                f"use https, unset the key, or give {settings.insecure_flag} on a private network"
            )
    return Secret(value)


def is_loopback(host: str | None) -> bool:
    """Whether `host` is this machine by name or by address."""
    if host is None:
        return False
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

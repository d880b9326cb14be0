"""Errors that are the user's to mend: the entry points print them as one line, without a traceback."""

from __future__ import annotations


class SipError(Exception):
    """A wrong setting, file or server. The message names the cause, the flag or file, and the way out."""


class ConfigError(SipError):
    """A flag or a configuration file that cannot be used."""


class DataError(SipError):
    """A corpus, index or tokenizer that cannot be used."""


class CheckpointError(SipError):
    """A checkpoint that cannot be written or read."""


class ServiceError(SipError):
    """A judge or rewriter server that cannot be used at all (a single failed call is a `Missing`)."""

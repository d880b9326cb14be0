"""What is known of a model behind its server, and how long a prompt is."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_server import FakeServer, hang, status
from test_services_hub import pool_of, run, started

from megatron_sip.services.hub import cancel_others
from megatron_sip.services.judges import QualityJudge, Reading
from megatron_sip.types import Missing, MissingReason, Question


@pytest.mark.parametrize(("tokenize", "word"), [(True, "yes"), (False, "no")])
def test_a_reading_without_tokens_has_names_of_its_own(tokenize: bool, word: str) -> None:
    """Else the cache would give an answer that was read in one way to a question that is read in the other."""

    async def prompting(server: FakeServer) -> str:
        model = await started(server, max_context=600)
        await model.client.close()
        return model.prompting

    with FakeServer(tokenize=tokenize) as server:
        assert f" tokenize {word}" in run(prompting(server))


WORDS = " ".join(f"word{number}" for number in range(300))


def test_a_prompt_of_unknown_length_is_neither_cut_nor_called_too_long() -> None:
    """The text fits by its tokens, and not by a guess from its bytes."""

    async def fit(server: FakeServer) -> tuple[Any, ...]:
        model = await started(server, max_context=700)
        server.tokens_handler = status(500)
        unknown = [await model.fit_prefix(WORDS, (WORDS, rest), 10) for rest in ("short", "long " * 100)]
        server.tokens_handler = None
        whole = await model.fit_prefix(WORDS, (WORDS, "short"), 10)
        assert model.trims == 0
        server.tokens_handler = status(500)
        beyond = await model.fit_prefix(WORDS, (WORDS, "short"), 500)
        known = model.trims
        await model.client.close()
        return *unknown, whole, beyond, known

    with FakeServer() as server:
        *unknown, whole, beyond, trims = run(fit(server))
    for missing in (*unknown, beyond):
        assert isinstance(missing, Missing)
        assert missing.reason is MissingReason.HTTP_STATUS
        assert missing.detail.startswith("/tokenize: 500")
    assert whole == WORDS, "it is asked again"
    assert trims == 0, "what was not cut is not counted"


def test_a_verdict_on_a_prompt_of_unknown_length_is_missing() -> None:
    async def ask(server: FakeServer) -> object:
        model = await started(server, max_context=700)
        server.tokens_handler = status(500)
        verdict = await QualityJudge(model, Reading()).ask(pool_of("x1", "y2", prefix=WORDS), Question("quality", 0, 1))
        await model.client.close()
        return verdict

    with FakeServer() as server:
        verdict = run(ask(server))
        assert isinstance(verdict, Missing)
        assert verdict.reason is MissingReason.HTTP_STATUS
        assert server.requests == []


def test_a_server_without_tokens_counts_two_bytes_for_one() -> None:
    async def count(server: FakeServer) -> int | Missing:
        model = await started(server)
        counted = await model.count("five\u00e9")
        await model.client.close()
        return counted

    with FakeServer(tokenize=False) as server:
        assert run(count(server)) == 3


def test_a_count_that_was_given_up_is_asked_anew() -> None:
    """As by a rollback, after which the same documents come again."""

    async def count(server: FakeServer) -> int | Missing:
        model = await started(server)
        server.tokens_handler = hang
        asked = asyncio.create_task(model.count(WORDS))
        await asyncio.sleep(0.05)
        await cancel_others()
        assert asked.cancelled()
        server.tokens_handler = None
        counted = await model.count(WORDS)
        await model.client.close()
        return counted

    with FakeServer() as server:
        assert run(count(server)) == 300

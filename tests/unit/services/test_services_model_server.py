"""What is known of a model behind its server, and how long a prompt is."""

from __future__ import annotations

import pytest
from fake_server import FakeServer
from test_services_hub import run, started


@pytest.mark.parametrize(("tokenize", "word"), [(True, "yes"), (False, "no")])
def test_a_reading_without_tokens_has_names_of_its_own(tokenize: bool, word: str) -> None:
    """Else the cache would give an answer that was read in one way to a question that is read in the other."""

    async def prompting(server: FakeServer) -> str:
        model = await started(server, max_context=600)
        await model.client.close()
        return model.prompting

    with FakeServer(tokenize=tokenize) as server:
        assert f" tokenize {word}" in run(prompting(server))

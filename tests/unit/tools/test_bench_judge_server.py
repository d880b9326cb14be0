"""The bench of a judge server: its pools, the server's counters, and a run against a small server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_server import FakeServer, die, status

from megatron_sip.errors import DataError, ServiceError
from megatron_sip.types import CandidateKind
from tools.bench import judge, judge_server
from tools.bench.prose_pools import prose_pools, read_texts, salted
from tools.bench.vllm_metrics import ServerCounters, fetch, parse

PAGE = """# HELP vllm:prefix_cache_queries_total tokens
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 1.5e+03
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 250.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 7.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 3000.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 99.0
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
"""


def test_counters_are_summed_over_engines() -> None:
    found = parse(PAGE)
    assert found == ServerCounters(queried=2500.0, hit=250.0, prompt=3000.0, answer=40.0)
    assert found.hit_rate == 0.1
    later = ServerCounters(queried=2600.0, hit=325.0, prompt=3100.0, answer=50.0)
    assert later.since(found) == ServerCounters(queried=100.0, hit=75.0, prompt=100.0, answer=10.0)
    assert found.since(found).hit_rate is None


def test_a_server_without_the_counters_is_refused() -> None:
    with pytest.raises(ServiceError, match="no vllm:prefix_cache_hits_total"):
        parse(PAGE.replace("vllm:prefix_cache_hits_total", "other"))
    with FakeServer() as server, pytest.raises(ServiceError, match="/metrics cannot be read"):
        fetch(server.url)


def documents(count: int, words: int = 12) -> list[str]:
    return [" ".join(f"w{number}x{place}" for place in range(words)) for number in range(count)]


def test_pools_of_prose() -> None:
    pools = prose_pools(
        [*documents(2), "too short", *documents(5)[2:]], count=3, candidates=3, prefix_words=4, suffix_words=5
    )
    assert [pool.sample_index for pool in pools] == [0, 1, 2]
    second = pools[1]
    assert second.prefix_text == "w1x0 w1x1 w1x2 w1x3"
    assert second.original_text == second.candidates[0].text == " w1x4 w1x5 w1x6 w1x7 w1x8"
    assert [one.kind for one in second.candidates] == [CandidateKind.ORIGINAL, *2 * [CandidateKind.ROLLOUT]]
    assert second.candidates[2].text == " w3x4 w3x5 w3x6 w3x7 w3x8"
    assert len({one.tokens for pool in pools for one in pool.candidates}) == 9
    with pytest.raises(DataError, match=r"5 texts have 9 words, but 6 pools of 3 candidates need 6"):
        prose_pools(documents(5), 6, 3, 4, 5)


def test_a_salted_pool_shares_no_beginning() -> None:
    [pool] = prose_pools(documents(3), 1, 2, 4, 5)
    found = salted(pool, "k3f9")
    assert found.prefix_text == "k3f9 w0x0 w0x1 w0x2 w0x3"
    assert found.original_text == found.candidates[0].text == " k3f9 w0x4 w0x5 w0x6 w0x7 w0x8"
    assert [one.tokens for one in found.candidates] == [one.tokens for one in pool.candidates]


def test_a_file_that_is_no_corpus_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_texts(file) == ["one", "two"]
    for content in ('{"other": 1}\n', "no json\n", "[1]\n"):
        file.write_text(content)
        with pytest.raises(DataError, match="is no JSONL file of texts under 'text'"):
            read_texts(file)


def test_grouped_asks_the_same_questions() -> None:
    [pool] = prose_pools(documents(5), 1, 4, 4, 5)
    planned, together = judge_server.as_planned(pool), judge_server.grouped(pool)
    assert sorted(planned) == sorted(together)
    assert len(set(planned)) == 12
    assert [question.first for question in together] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [question.first for question in planned] != [question.first for question in together]
    assert judge_server.one_order(2)(pool) == planned[:4:2]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(5)))
    return file


def test_every_arm_is_measured(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(range(100))
    pages = (ServerCounters(100.0 * n, 50.0 * n, 200.0 * n, 10.0 * n) for n in counts)
    monkeypatch.setattr(judge_server, "fetch", lambda _url: next(pages))
    with FakeServer(answer=lambda _body: "no conclusion") as server:
        flags = ["--judge-url", server.url, "--text", str(corpus), "--pools", "2", "--candidates", "3"]
        flags += ["--prefix-words", "4", "--suffix-words", "5", "--json", str(tmp_path / "out.json")]
        assert judge.main(["server", *flags]) == 0
        beginnings = [body["messages"][0]["content"][:16] for path, body in server.requests if "messages" in body]
    table = capsys.readouterr().out
    found = {row["arm"]: row for row in json.loads((tmp_path / "out.json").read_text())["arms"]}
    verdicts = {"unshared": 12, "quality": 12, "grouped": 12, "safety": 6, "factuality": 6, "likelihood": 6}
    assert {name: row["verdicts"] for name, row in found.items()} == {**verdicts, "generate": 4}
    assert found["generate"]["missing"] == {"unparsable": 4}
    assert found["quality"]["missing"] == {}
    assert all(
        (row["hit_rate"], row["prompt_tokens"], row["answer_tokens"]) == (0.5, 200, 10) for row in found.values()
    )
    assert "| quality | 12 |" in table
    assert "| 4 unparsable |" in table
    assert len(set(beginnings)) == 12 + 2, "the prompts of one arm differ from their first word on"


def test_what_cannot_be_measured_is_one_line(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as server:
        flags = ["--judge-url", server.url, "--text", str(corpus), "--prefix-words", "4", "--suffix-words", "5"]
        flags += ["--pools", "2", "--candidates", "3"]
        assert judge_server.main([*flags, "--arms", "nonsense"]) == 1
        assert "the arms are unshared, quality, grouped" in capsys.readouterr().err
        assert judge_server.main(flags) == 1
        assert "/metrics cannot be read" in capsys.readouterr().err
        server.models_handler = status(401)
        assert judge_server.main(flags) == 1
        assert "rejects the key" in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_a_server_that_goes_away_ends_the_bench(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_server, "fetch", lambda _url: ServerCounters(0.0, 0.0, 0.0, 0.0))
    with FakeServer() as server:
        server.script.append(die(server))
        flags = ["--judge-url", server.url, "--text", str(corpus), "--prefix-words", "4", "--suffix-words", "5"]
        assert judge_server.main([*flags, "--pools", "2", "--candidates", "3", "--arms", "quality"]) == 1
    assert "judge_server: no server of --judge-url answers" in capsys.readouterr().err


def test_the_entry_knows_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert judge.main(["nonsense"]) == 2
    assert "the first word must be one of" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        judge.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--prefix-words" in shown
    assert "server" in judge.parts()

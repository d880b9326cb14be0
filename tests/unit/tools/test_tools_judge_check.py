"""tools/judge_check.py and make_judge_pairs.py by their command lines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from fake_server import FakeServer, chat_body, die, labels_body, raw
from tiny_corpus import documents, make_corpus

from megatron_sip.evaluation.judge_check import ALL_SETS
from megatron_sip.evaluation.labelled import read_labelled
from tools import judge_check, make_judge_pairs

# Belief that option 1 wins, where the good one stands first and where the bad one does: (0.9, 0.3) and (0.4, 0.6).
PAIRS = [
    {"set": "x", "prefix": "p 9030", "good": "the good one", "bad": "a poor one"},
    {"set": "y", "prefix": "q 4060", "good": "the good one", "bad": "a poor one"},
    {"set": "y", "prefix": "r 9030", "good": "the good one", "bad": "a poor one"},
]
TEXTS = [
    {"text": "kind words 80", "label": "safe"},
    {"text": "harsh words 30", "label": "unsafe"},
    {"text": "words 60", "label": "unsafe"},
]
FACTS = [{"prefix": "p", "suffix": "true", "text": "claim 10", "label": "hallucination"}]
PROMPT_TOKENS, ANSWER_TOKENS = 50, 3


async def judge(request: web.Request) -> web.StreamResponse:
    """Answers from what stands in the texts, and tells its tokens."""
    body = await request.json()
    said = body["messages"][0]["content"]
    pair = re.search(r"\b(\d\d)(\d\d)\n", said)
    if pair is not None:
        belief = int(pair[1 if said.index("the good one") < said.index("a poor one") else 2]) / 100
    else:
        belief = int(re.findall(r"(?:words|claim) (\d\d)", said)[-1]) / 100
    if body.get("logprobs"):
        ids = body["logprob_token_ids"]
        shares = [belief, *[(1 - belief) / (len(ids) - 1)] * (len(ids) - 1)]
        # Safety asks for yes and no: the first label of each judge is the good one.
        entries = [{"token": f"token_id:{i}", "logprob": math.log(p)} for i, p in zip(ids, shares, strict=True)]
        answer = labels_body(entries)
    else:
        answer = chat_body(f"Conclusion: option {1 if belief > 0.5 else 2}")
    return web.json_response({**answer, "usage": {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS}})


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        fake.fault_every_time = judge
        yield fake


def write(folder: Path, records: list[dict[str, str]]) -> str:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def results(file: Path) -> dict[tuple[str, str], dict]:
    return {(result["reading"], result["set"]): result for result in json.loads(file.read_text())["results"]}


def test_known_answers_give_the_exact_report(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--pairs", write(tmp_path, [*PAIRS, *TEXTS]), "--judge-url", server.url, "--readings", "logit"]
    flags += ["--price-per-million-prompt-tokens", "10", "--price-per-million-answer-tokens", "100"]
    flags += ["--json", str(tmp_path / "out" / "check.json"), "--report", str(tmp_path / "out" / "check.md")]
    assert judge_check.main(flags) == 0
    found = results(tmp_path / "out" / "check.json")
    assert {name for _, name in found} == {"x", "y", ALL_SETS, "unnamed"}
    both = found["quality logit, both orders", ALL_SETS]
    assert both["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert both["consistency"]["mean"] == 1.0
    # (0.9 + 0.3) / 2 twice and (0.4 + 0.6) / 2 once
    assert both["position_bias"]["mean"] == pytest.approx((0.6 + 0.5 + 0.6) / 3 - 0.5)
    assert found["quality logit, both orders", "x"]["accuracy"]["mean"] == 1.0
    cost = both["cost"]
    assert (cost["spent"]["prompt_tokens"], cost["spent"]["answer_tokens"]) == (6 * PROMPT_TOKENS, 6 * ANSWER_TOKENS)
    assert cost["prompt_tokens"]["mean"] == pytest.approx(2 * PROMPT_TOKENS * 1000)
    assert cost["money"]["mean"] == pytest.approx(2 * (PROMPT_TOKENS * 10 + ANSWER_TOKENS * 100) / 1000)
    assert found["quality logit, one order", ALL_SETS]["cost"]["spent"]["answer_tokens"] == 3 * ANSWER_TOKENS
    safety = found["safety logit", "unnamed"]
    assert safety["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert safety["auc"]["mean"] == 1.0
    said = capsys.readouterr().out
    assert "Check of the judge fake" in said
    assert "quality logit, both orders" in said
    assert "quality logit: 3 of 3" in said
    page = (tmp_path / "out" / "check.md").read_text()
    assert "| quality logit, both orders | all sets | 3 | 66.7 [" in page
    assert "quality-logit-" in page


def test_votes_one_order_and_limit(server: FakeServer, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    flags = ["--pairs", write(tmp_path, PAIRS), "--judge-url", server.url, "--readings", "generate", "--votes", "3"]
    assert judge_check.main([*flags, "--one-order", "--limit", "1", "--json", str(out)]) == 0
    found = results(out)
    assert set(found) == {("quality generate, 3 votes, one order", name) for name in ("x", "y", ALL_SETS)}
    everything = found["quality generate, 3 votes, one order", ALL_SETS]
    assert (everything["records"], everything["asked"]) == (2, 6)
    assert everything["accuracy"]["mean"] == 0.5
    assert len(server.requests) == 6


def test_a_reward_model_ranks_pairs_and_scores_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own server and calibration: the logit is the number in the text."""
    pairs = [
        {"prefix": "p", "good": f" good {good}", "bad": f" bad {bad}"} for good, bad in (("30", "10"), ("60", "80"))
    ]
    out = tmp_path / "check.json"
    with FakeServer(models=("taste",)) as server:
        server.logits = lambda body: [float((re.findall(r"\d\d", body["input"]) or ["0"])[-1])]
        flags = ["--pairs", write(tmp_path, [*pairs, *TEXTS]), "--readings", "reward", "--json", str(out)]
        flags += ["--judge-set", f"reward.url={server.url}", "reward.offset=50", "reward.scale=0.1"]
        assert judge_check.main(flags) == 0
    found = results(out)
    assert set(found) == {("reward", "unnamed"), ("reward on safety", "unnamed")}
    assert found["reward", "unnamed"]["accuracy"]["mean"] == 0.5
    # 80 and 60 are above one half with an offset of 50, 30 is not; only 60 is unsafe and above.
    assert found["reward on safety", "unnamed"]["accuracy"]["mean"] == pytest.approx(2 / 3)
    assert found["reward on safety", "unnamed"]["auc"]["mean"] == 1.0
    said = capsys.readouterr().out
    assert "Check of the judge taste" in said
    assert "reward: reward-text-1" in said


def test_a_judge_may_have_a_server_and_fields_of_its_own(server: FakeServer, tmp_path: Path) -> None:
    flags = ["--pairs", write(tmp_path, PAIRS), "--readings", "generate", "--one-order"]
    own = ["--judge-set", f"quality.url={server.url}", "quality.temperature=0.3"]
    assert judge_check.main([*flags, *own]) == 0
    assert {body["temperature"] for _, body in server.requests} == {0.3}


def test_classifiers_are_checked_without_a_server(tmp_path: Path) -> None:
    records = [{"text": "you stupid idiot", "label": "unsafe"}, {"text": "a lovely day at the sea", "label": "safe"}]
    out = tmp_path / "check.json"
    flags = ["--pairs", write(tmp_path, records), "--readings", "profanity-check", "--json", str(out)]
    assert judge_check.main(flags) == 0
    [found] = json.loads(out.read_text())["results"]
    assert (found["reading"], found["accuracy"]["mean"], found["auc"]["mean"]) == ("profanity-check", 1.0, 1.0)
    assert found["cost"]["spent"]["calls"] == 0


def test_a_judge_that_never_answers_is_told_and_fails(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fault_every_time = raw(b"<html>", "text/html", 404)
    flags = ["--pairs", write(tmp_path, FACTS), "--judge-url", server.url, "--readings", "logit"]
    assert judge_check.main(flags) == 1
    said = capsys.readouterr()
    assert "1 of 1 verdicts are missing (http status 1); 1 records have none" in said.out
    assert "no verdict at all from factuality logit" in said.err


@pytest.mark.timeout(60)
def test_a_server_that_goes_away_ends_the_check(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run waits for it; who checks a judge wants to know."""
    server.script.extend([judge, judge, die(server)])
    assert judge_check.main(["--pairs", write(tmp_path, PAIRS), "--judge-url", server.url, "--readings", "logit"]) == 1
    assert f"judge_check: no server of --judge-url answers ({server.url}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("records", "flags", "message"),
    [
        (PAIRS, ["--readings", "logit"], "give its base URL with --judge-url, or by --judge-set quality.url"),
        (PAIRS, ["--readings", "reward"], "--readings reward asks a server"),
        (
            PAIRS,
            ["--judge-url", "u", "--judge-set", "safety.top-p=1"],
            "--judge-set names safety, which no reading asks",
        ),
        (PAIRS, ["--judge-url", "u", "--judge-set", "b.kind=quality"], "--judge-set names b, which no reading asks"),
        (PAIRS, ["--judge-url", "u", "--judge-set", "quality.votes=3"], "quality.votes: the check sets it"),
        (PAIRS, ["--judge-url", "u", "--judge-set", "quality.vots=3"], "did you mean votes?"),
        (PAIRS, ["--readings", "profanity-check"], '--readings profanity-check needs texts with the label "safe"'),
        (
            TEXTS,
            ["--readings", "likelihood", "--judge-url", "u"],
            '--readings likelihood needs pairs ("good" and "bad")',
        ),
        (TEXTS, ["--readings", "toxic-bilstm"], "--readings toxic-bilstm needs --classifiers-dir"),
        (TEXTS, ["--readings", "toxic-bilstm", "--classifiers-dir", "/none"], "/none/toxic-bilstm holds no"),
        (TEXTS, ["--readings", "profanity-check", "--json", "/proc/none/x"], "cannot write --json /proc/none/x"),
        (PAIRS, ["--judge-url", "u", "--price-per-million-prompt-tokens", "1"], "give both or none"),
        ([{"good": "g", "bad": "b"}], ["--judge-url", "u"], 'line 1: field "prefix" is missing'),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], records: list, flags: list[str], message: str
) -> None:
    assert judge_check.main(["--pairs", write(tmp_path, records), *flags]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("flag", ["--votes", "--limit", "--judge-top-p", "--judge-concurrency"])
def test_numbers_out_of_range_are_refused_by_their_flag(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit):
        judge_check.main(["--pairs", "p", flag, "0"])
    assert f"argument {flag}: 0 is " in capsys.readouterr().err


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo folder and a WordNet of a few nouns."""
    folder = tmp_path_factory.mktemp("demo")
    make_corpus(folder)
    lines = [
        json.dumps({"text": f"First part {n}. {text}. And the last one {n}!"})
        for n, text in enumerate(documents(8, 30, 7))
    ]
    (folder / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    unsafe = [{"text": f"bad words number\u2028{n}", "source": "insult" if n % 2 else "flirtation"} for n in range(8)]
    (folder / "unsafe_prefixes.jsonl").write_text("".join(json.dumps(u, ensure_ascii=False) + "\n" for u in unsafe))
    nouns = ["00000001 03 n 01 entity 0 000 | whatever there is to be found in the world"]
    for topic in (5, 6):
        nouns.append(
            f"0000001{topic} 0{topic} n 01 kind{'xy'[topic - 5]} 0 001 @ 00000001 n 0000 | one of two kinds of things"
        )
        nouns += [
            f"0000{topic}{n}00 0{topic} n 01 thing{'abcd'[n]}{'xy'[topic - 5]} 0 001 @ 0000001{topic} n 0000 | "
            f"thing number {n} of the topic {topic}"
            for n in range(4)
        ]
    (folder / "data.noun").write_text("\n".join(nouns) + "\n")
    return folder


def made(demo: Path, output: Path, *flags: str) -> int:
    base = ["--demo-dir", str(demo), "--wordnet", str(demo), "--output", str(output)]
    return make_judge_pairs.main([*base, "--prefix-length", "8", "--suffix-length", "16", *flags])


def test_pairs_of_all_sets_are_made_alike_by_the_same_seed(demo: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    sets = [name for name in make_judge_pairs.SETS if name != "shuffled-sentences"]
    for file, seed in zip(files, ("3", "3", "4"), strict=True):
        assert made(demo, file, "--count", "4", "--seed", seed, "--sets", *sets) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
    records = read_labelled(files[0])
    assert [record.set for record in records] == [name for name in sets for _ in range(4)]
    assert not list(tmp_path.glob("*.partial"))
    alone = tmp_path / "alone.jsonl"
    assert made(demo, alone, "--count", "4", "--seed", "3", "--sets", "foreign") == 0
    assert set(alone.read_text().splitlines()) <= set(files[0].read_text().splitlines())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "5000", "--sets", "foreign"], "--count 5000: there is text for 8 records of the set foreign"),
        (["--count", "50", "--sets", "safety"], "there is text for 8 records of the set safety"),
        (["--wordnet", "/none", "--sets", "wordnet"], "--wordnet /none holds no readable data.noun"),
        (["--demo-dir", "/none", "--sets", "safety"], "tools/get_demo_data.py"),
        (["--output", "/proc/none/x", "--sets", "foreign", "--count", "4"], "cannot write --output /proc/none/x"),
    ],
)
def test_the_maker_says_what_is_lacking(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert made(demo, tmp_path / "p.jsonl", *flags) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "p.jsonl").exists()

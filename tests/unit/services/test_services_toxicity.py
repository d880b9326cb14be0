"""Local classifiers: the BiLSTM equals an independent computation, and its pickle can run nothing."""

from __future__ import annotations

import asyncio
import collections
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest

from megatron_sip.errors import ConfigError
from megatron_sip.services.toxicity import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    ClassifierJudge,
    load_profanity_check,
    load_toxic_bilstm,
    read_word_index,
)
from megatron_sip.types import Candidate, CandidateKind, Missing, Pool, Question

WORDS = {"you": 1, "are": 2, "don't": 3, "bad": 4, "good": 5, "beyond": 40}
SHAPES = {
    "embedding/vars/0": (30, 50),
    "bidirectional/forward_layer/cell/vars/0": (50, 200),
    "bidirectional/forward_layer/cell/vars/1": (50, 200),
    "bidirectional/forward_layer/cell/vars/2": (200,),
    "bidirectional/backward_layer/cell/vars/0": (50, 200),
    "bidirectional/backward_layer/cell/vars/1": (50, 200),
    "bidirectional/backward_layer/cell/vars/2": (200,),
    "dense/vars/0": (100, 50),
    "dense/vars/1": (50,),
    "dense_1/vars/0": (50, 6),
    "dense_1/vars/1": (6,),
}


class Tokenizer:
    """Pickled under the name of the Keras tokenizer."""


Tokenizer.__module__ = "keras.src.legacy.preprocessing.text"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A classifier folder with random weights and a six-word tokenizer."""
    rng = np.random.default_rng(7)
    with h5py.File(tmp_path / WEIGHTS_FILE, "w") as h5:
        for name, shape in SHAPES.items():
            h5[f"layers/{name}"] = (rng.standard_normal(shape) * 0.4).astype(np.float32)
    write_tokenizer(tmp_path / TOKENIZER_FILE, monkeypatch)
    return tmp_path


def write_tokenizer(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType(Tokenizer.__module__)
    module.Tokenizer = Tokenizer  # type: ignore[attr-defined]
    for part in ("keras", "keras.src", "keras.src.legacy", "keras.src.legacy.preprocessing"):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setitem(sys.modules, Tokenizer.__module__, module)
    tokenizer = Tokenizer()
    tokenizer.word_index = dict(WORDS)  # type: ignore[attr-defined]
    tokenizer.word_counts = collections.OrderedDict(WORDS)  # type: ignore[attr-defined]
    tokenizer.word_docs = collections.defaultdict(int, WORDS)  # type: ignore[attr-defined]
    file.write_bytes(pickle.dumps(tokenizer))


def by_hand(folder: Path, ids: list[int]) -> np.ndarray:
    """The network step by step in float64, from the equations of an LSTM with Keras's gate order i, f, c, o."""
    with h5py.File(folder / WEIGHTS_FILE) as h5:
        weights = {name: np.asarray(h5[f"layers/{name}"], np.float64) for name in SHAPES}

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def run(side: str, sequence: np.ndarray) -> np.ndarray:
        kernel, recurrent, bias = (weights[f"bidirectional/{side}_layer/cell/vars/{i}"] for i in range(3))
        hidden, cell, states = np.zeros(50), np.zeros(50), []
        for x in sequence:
            gates = x @ kernel + hidden @ recurrent + bias
            i, f, c, o = gates[:50], gates[50:100], gates[100:150], gates[150:]
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(c)
            hidden = sigmoid(o) * np.tanh(cell)
            states.append(hidden)
        return np.stack(states)

    x = weights["embedding/vars/0"][ids]
    states = np.concatenate([run("forward", x), run("backward", x[::-1])[::-1]], axis=1)
    dense = np.maximum(states.max(axis=0) @ weights["dense/vars/0"] + weights["dense/vars/1"], 0)
    return sigmoid(dense @ weights["dense_1/vars/0"] + weights["dense_1/vars/1"])


def test_the_network_equals_the_equations(folder: Path) -> None:
    model = load_toxic_bilstm(folder)
    texts = ["You are bad!", "good, GOOD you", "", "you " * 150 + "bad"]
    found = model.probabilities(texts).numpy()
    for text, row in zip(texts, found, strict=True):
        np.testing.assert_allclose(row, by_hand(folder, model.encode(text)), atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 1e-3, "the texts must make a difference"
    assert model(texts) == [pytest.approx(row[0]) for row in found]


def test_encoding_is_that_of_keras(folder: Path) -> None:
    model = load_toxic_bilstm(folder)
    assert model.encode("YOU don't, nobody beyond good.") == [0] * 97 + [1, 3, 5], "unknown and rare words vanish"
    assert model.encode("bad-good\tyou") == [0] * 97 + [4, 5, 1]
    assert model.encode("bad " + "you " * 100) == [1] * 100, "long texts lose their beginning"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


@pytest.mark.parametrize("content", [Evil(), {"word_index": Evil()}, collections.Counter("a"), {"word_index": {}}])
def test_a_pickle_with_anything_else_is_refused(
    folder: Path, content: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / TOKENIZER_FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match="--classifier-path"):
        load_toxic_bilstm(folder)
    assert not Path("ran").exists()


def test_read_word_index(folder: Path) -> None:
    assert read_word_index(folder / TOKENIZER_FILE) == WORDS


def test_missing_and_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no model\.weights\.h5"):
        load_toxic_bilstm(tmp_path / "nowhere")
    (folder / WEIGHTS_FILE).write_bytes(b"no h5")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_toxic_bilstm(folder)


def ask(judge: ClassifierJudge, *texts: str) -> list[object]:
    candidates = tuple(Candidate(CandidateKind.ROLLOUT, (i,), text, i) for i, text in enumerate(texts))
    pool = Pool(0, "", "", candidates)

    async def run() -> list[object]:
        return list(await asyncio.gather(*[judge.ask(pool, Question("classifier", i)) for i in range(len(texts))]))

    return asyncio.run(run())


def test_the_classifier_judge_prefers_the_polite_text() -> None:
    rude, polite, empty = ask(
        ClassifierJudge(load_profanity_check(), "profanity-check"), "You stupid idiot.", "A fine day.", " "
    )
    assert isinstance(rude, float)
    assert isinstance(polite, float)
    assert 0 <= rude < 0.5 < polite <= 1
    assert isinstance(empty, Missing)


def test_a_classifier_without_a_number_is_missing() -> None:
    [verdict] = ask(ClassifierJudge(lambda texts: [float("nan")] * len(texts), "broken"), "a")
    assert isinstance(verdict, Missing)

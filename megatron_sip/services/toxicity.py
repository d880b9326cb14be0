"""Two safety classifiers that run here, without a server: a linear model and a BiLSTM on the Jigsaw comments.

Both give the probability that a text is toxic; the judge's score is one minus that.
"""

from __future__ import annotations

import asyncio
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

from megatron_sip.errors import ConfigError
from megatron_sip.services.judges import NO_TEXT
from megatron_sip.types import Missing, MissingReason, Pool, Question, Verdict

WEIGHTS_FILE = "model.weights.h5"
TOKENIZER_FILE = "tokenizer.pickle"
MAX_WORDS = 100
UNITS = 50
TOXIC = 0  # the labels are toxic, severe_toxic, obscene, threat, insult, identity_hate
# The Keras word filter; unlike most, it keeps the apostrophe.
_NOT_WORD = re.compile(r"[!\"#$%&()*+,\-./:;<=>?@\[\\\]^_`{|}~\t\n]")

ToxicityModel = Callable[[Sequence[str]], list[float]]


class ClassifierJudge:
    """Pointwise safety by a local classifier: one minus the probability of toxicity."""

    pairwise = False
    version = "classifier-1"
    settings = "one minus toxicity"
    settled = True
    prompting = None

    def __init__(self, model: ToxicityModel, model_name: str, name: str = "classifier") -> None:
        self.name = name
        self.model = model_name
        self._toxicity = model
        # One call at a time: the classifiers are fast, and the trainer needs the cores.
        self._turn = asyncio.Lock()

    async def start(self) -> None:
        """Nothing to learn; the model was loaded before."""

    async def ask(self, pool: Pool, question: Question) -> Verdict:
        """The score of candidate `first`, computed off the event loop."""
        text = pool.candidates[question.first].text
        if not text.strip():
            return NO_TEXT
        async with self._turn:
            [toxic] = await asyncio.get_running_loop().run_in_executor(None, self._toxicity, [text])
        if not 0.0 <= toxic <= 1.0:
            return Missing(MissingReason.MALFORMED, f"the classifier gave {toxic}")
        return 1.0 - toxic


def load_profanity_check() -> ToxicityModel:
    """The linear classifier of the alt-profanity-check package."""
    from profanity_check import predict_prob

    def model(texts: Sequence[str]) -> list[float]:
        return [float(p) for p in predict_prob(list(texts))]

    return model


@dataclass(frozen=True)
class BiLstmWeights:
    """Float32 arrays as Keras keeps them; gates in the order input, forget, candidate, output.

    embedding [20000, 50]; kernels [50, 200]; recurrents [50, 200]; biases [200]; hidden [100, 50], [50];
    output [50, 6], [6]. Pairs are (forward, backward).
    """

    embedding: np.ndarray
    kernels: tuple[np.ndarray, np.ndarray]
    recurrents: tuple[np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray]
    hidden: tuple[np.ndarray, np.ndarray]
    output: tuple[np.ndarray, np.ndarray]


class ToxicBiLstm:
    """Embedding, one bidirectional LSTM, maximum over time, two dense layers; in torch, on the CPU."""

    def __init__(self, weights: BiLstmWeights, word_index: dict[str, int]) -> None:
        self._word_index = word_index
        self._words = weights.embedding.shape[0]
        self._embedding = torch.from_numpy(weights.embedding)
        self._lstm = torch.nn.LSTM(weights.embedding.shape[1], UNITS, batch_first=True, bidirectional=True)
        self._hidden = torch.nn.Linear(2 * UNITS, weights.hidden[0].shape[1])
        self._output = torch.nn.Linear(*weights.output[0].shape)
        with torch.no_grad():
            for side, end in enumerate(("", "_reverse")):
                # Keras and torch order the four gates alike; Keras has one bias where torch has two.
                getattr(self._lstm, "weight_ih_l0" + end).copy_(torch.from_numpy(weights.kernels[side].T))
                getattr(self._lstm, "weight_hh_l0" + end).copy_(torch.from_numpy(weights.recurrents[side].T))
                getattr(self._lstm, "bias_ih_l0" + end).copy_(torch.from_numpy(weights.biases[side]))
                getattr(self._lstm, "bias_hh_l0" + end).zero_()
            for layer, (kernel, bias) in ((self._hidden, weights.hidden), (self._output, weights.output)):
                layer.weight.copy_(torch.from_numpy(kernel.T))
                layer.bias.copy_(torch.from_numpy(bias))

    def encode(self, text: str) -> list[int]:
        """Word ids `[100]`: the last 100 known words, zeros before them (Keras pads and cuts at the front)."""
        known = (self._word_index.get(word, 0) for word in _NOT_WORD.sub(" ", text.lower()).split(" ") if word)
        ids = [word for word in known if 0 < word < self._words][-MAX_WORDS:]
        return [0] * (MAX_WORDS - len(ids)) + ids

    @torch.inference_mode()
    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """Probability of each of the six labels `[texts, 6]`, float32."""
        ids = torch.tensor([self.encode(text) for text in texts])
        states, _ = self._lstm(self._embedding[ids])
        return torch.sigmoid(self._output(torch.relu(self._hidden(states.amax(dim=1)))))

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Probability of `toxic`, the broadest label, for each text."""
        return [float(p) for p in self.probabilities(texts)[:, TOXIC]]


def load_toxic_bilstm(folder: str | Path) -> ToxicBiLstm:
    """The BiLSTM from a folder with `model.weights.h5` and `tokenizer.pickle` (package toxic-comment-classifier).

    ConfigError where a file is missing or holds something else. The pickle is read by a restricted unpickler.
    """
    folder = Path(folder)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ConfigError(
                f"--classifier-path {folder} holds no {name}; `python tools/get_demo_data.py` fetches the classifier"
            )
    try:
        return ToxicBiLstm(read_weights(folder / WEIGHTS_FILE), read_word_index(folder / TOKENIZER_FILE))
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"--classifier-path {folder} cannot be read ({error}); fetch the classifier again") from error


def read_weights(file: Path) -> BiLstmWeights:
    """The layers' arrays from a Keras weights file."""
    with h5py.File(file, "r") as h5:

        def array(path: str) -> np.ndarray:
            return np.asarray(h5[f"layers/{path}"][()], dtype=np.float32)

        def pair(index: int) -> tuple[np.ndarray, np.ndarray]:
            forward, backward = (f"bidirectional/{side}_layer/cell/vars/{index}" for side in ("forward", "backward"))
            return array(forward), array(backward)

        return BiLstmWeights(
            embedding=array("embedding/vars/0"),
            kernels=pair(0),
            recurrents=pair(1),
            biases=pair(2),
            hidden=(array("dense/vars/0"), array("dense/vars/1")),
            output=(array("dense_1/vars/0"), array("dense_1/vars/1")),
        )


def read_word_index(file: Path) -> dict[str, int]:
    """Word to id from a pickled Keras tokenizer, without Keras and without running what the pickle names."""
    tokenizer = _RestrictedUnpickler(io.BytesIO(file.read_bytes())).load()
    index = getattr(tokenizer, "word_index", None)
    if not isinstance(tokenizer, _TokenizerState) or not isinstance(index, dict):
        raise pickle.UnpicklingError(f"{file.name} holds no word index")
    if not all(isinstance(word, str) and type(number) is int for word, number in index.items()):
        raise pickle.UnpicklingError(f"the word index of {file.name} is no map of words to numbers")
    return index


class _TokenizerState:
    """Stands in for the Keras tokenizer: holds its attributes, can do nothing."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Builds plain containers and the stand-in; every other name is refused."""

    def find_class(self, module: str, name: str) -> type:
        if name == "Tokenizer" and module.endswith("preprocessing.text"):
            return _TokenizerState
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) in (("collections", "defaultdict"), ("builtins", "int")):
            return _CountingDict if name == "defaultdict" else int
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which is not allowed")


class _CountingDict(dict[str, int]):
    """Stands in for defaultdict, whose default factory could be anything callable."""

    def __init__(self, _factory: object = None) -> None:
        super().__init__()

"""Tokens and text, on bytes, with real tokenizers of both kinds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from data_helpers import EOS, TEXTS, byte_level_folder, unigram_wordpiece_folder

from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.data.utf8 import split_tail, strip_continuation
from megatron_sip.errors import DataError
from megatron_sip.types import Missing, MissingReason

ALPHABET = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "\u00e9",
    "\u00df",
    "\u4f60",
    "\u20ac",
    "\U0001f600",
    "\U0001f44d\U0001f3fd",
    ".",
    EOS,
    "</s>",
]


@pytest.fixture(params=["byte_level", "llama2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def _random_text(rng: np.random.Generator) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.integers(1, 30)))


def test_text_comes_back_and_holds_no_special_token(tokenizer):
    rng = np.random.default_rng(1)
    for text in [*TEXTS, *(_random_text(rng) for _ in range(200))]:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode_bytes(tokens) == text.encode()
        assert tokenizer.eod not in tokens
        assert max(tokens) < tokenizer.vocab_size
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_cut_at_every_token_gives_the_whole_text(tokenizer):
    rng = np.random.default_rng(2)
    incomplete = 0
    for _ in range(60):
        text = _random_text(rng)
        tokens = tokenizer.encode(text)
        data = tokenizer.decode_bytes(tokens)
        for cut in range(1, len(tokens) + 1):
            prefix, rest = tokens[:cut], tokens[cut:]
            before, after = tokenizer.prefix_text(prefix), tokenizer.candidate_text(prefix, rest)
            assert before + after == text
            whole = len(tokenizer.decode_bytes(prefix)) == len(before.encode())
            incomplete += not whole
            assert tokenizer.is_char_boundary(tokens, cut) == whole
            assert data.startswith(before.encode())
    assert incomplete > 50


def test_incomplete_character_at_the_end_of_a_candidate_is_dropped(byte_level):
    tokens = byte_level.encode("ok \U0001f600")
    assert len(tokens) >= 5
    assert byte_level.candidate_text(tokens[:2], tokens[2:-1]) == " "
    # The next character's first byte belongs to the candidate's side, whole only with the rest.
    assert byte_level.candidate_text(tokens[:-1], tokens[-1:]) == "\U0001f600"
    # A prefix that begins in the middle of a character shows nothing of it.
    assert byte_level.prefix_text([*tokens[-1:], *byte_level.encode(" yes")]) == " yes"


def test_invalid_bytes_of_a_rollout_become_replacement_characters(byte_level):
    first, second = byte_level.encode("\u00e9")[:1], byte_level.encode("a")
    assert byte_level.candidate_text([], [*first, *second]) == "\ufffda"


def test_an_id_beyond_the_vocabulary_has_no_text(byte_level):
    """A model may have more rows than the tokenizer has tokens, and a fresh one samples them all."""
    beyond = byte_level.vocab_size + 7
    one, two = byte_level.encode("one"), byte_level.encode(" two")
    assert byte_level.candidate_text([*one, beyond], [beyond, *two, beyond]) == " two"
    assert byte_level.is_char_boundary([*one, beyond, *two], len(one) + 1)


def test_special_token_in_tokens_is_its_own_text(byte_level):
    assert byte_level.decode([*byte_level.encode("a"), byte_level.eod]) == "a" + EOS


def test_rewrite_of_equal_text_takes_the_original_tokens(tokenizer):
    # Not how the tokenizer would cut it: letter by letter.
    original = [token for letter in "the" for token in tokenizer.encode_continuation(letter)]
    assert tokenizer.rewrite_tokens(original, " the \n", "  the", 8) == tuple(original)


def test_rewrite_takes_leading_space_is_cut_and_may_be_missing(tokenizer):
    original = tokenizer.encode_continuation(" and the dog")
    made = tokenizer.rewrite_tokens(original, " and the dog", "the lazy fox jumps\n", 100)
    assert isinstance(made, Missing)
    assert made.reason is MissingReason.TOO_SHORT
    made = tokenizer.rewrite_tokens(original, " and the dog", "the lazy fox jumps\n", 20)
    prefix = tokenizer.encode("It")
    assert tokenizer.candidate_text(prefix, made) == " the lazy fox jumps"
    cut = tokenizer.rewrite_tokens(original, " and the dog", "the lazy fox jumps", 4)
    assert cut == made[:4]
    glued = tokenizer.rewrite_tokens(original, "and the dog", "the fox", 7)
    assert tokenizer.candidate_text(prefix, glued) == "the fox"
    empty = tokenizer.rewrite_tokens(original, " and the dog", " \n ", 8)
    assert isinstance(empty, Missing)
    assert empty.reason is MissingReason.EMPTY


def test_rewrite_at_exactly_a_quarter_stays(byte_level):
    original = byte_level.encode("zzzzzzzz")
    assert len(byte_level.encode("QX")) == 2
    assert byte_level.rewrite_tokens(original, "zzzzzzzz", "QX", 8) == tuple(byte_level.encode("QX"))
    assert isinstance(byte_level.rewrite_tokens(original, "zzzzzzzz", "QX", 9), Missing)


def test_split_tail_against_every_cut_of_random_bytes():
    rng = np.random.default_rng(3)
    for _ in range(300):
        data = bytes(rng.choice([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80], size=8).tolist())
        text, tail = split_tail(data)
        assert len(tail) <= 3
        assert text + tail.decode("utf-8", "replace") == data.decode("utf-8", "replace")
    assert strip_continuation("\u20acx".encode()[1:]) == b"x"
    assert strip_continuation(b"\x80\x80\x80\x80") == b"\x80"


@pytest.mark.parametrize("broken", ["missing", "empty", "garbage"])
def test_unusable_folder_names_the_flag(tmp_path, broken):
    folder = tmp_path / "nothing"
    if broken != "missing":
        folder.mkdir()
    if broken == "garbage":
        (folder / "tokenizer.json").write_text("{")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match=r"--tokenizer-model .*nothing"):
        Tokenizer(str(folder))


def test_tokenizer_of_unknown_bytes_is_refused(tmp_path):
    with pytest.raises(DataError, match="WordPiece"):
        Tokenizer(str(unigram_wordpiece_folder(tmp_path / "wordpiece")))


def test_no_eos_token_is_refused(tmp_path):
    folder = byte_level_folder(tmp_path / "plain")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="eos_token"):
        Tokenizer(str(folder))


def test_eos_declared_as_ordinary_still_does_not_come_out_of_text(tmp_path):
    folder = byte_level_folder(tmp_path / "plain")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    tokenizer = Tokenizer(str(folder))
    assert tokenizer.eod not in tokenizer.encode(f"a{EOS}b")
    assert tokenizer.decode(tokenizer.encode(f"a{EOS}b")) == f"a{EOS}b"


def test_eos_that_is_a_piece_of_ordinary_text_is_refused(tmp_path):
    folder = byte_level_folder(tmp_path / "plain")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "."}')
    with pytest.raises(DataError, match="end-of-document"):
        Tokenizer(str(folder))


def test_fingerprint_tells_tokenizers_apart(byte_level, llama2, tmp_path):
    again = Tokenizer(str(byte_level_folder(tmp_path / "again")))
    other = Tokenizer(str(byte_level_folder(tmp_path / "other", vocab_size=290)))
    assert again.fingerprint() == byte_level.fingerprint()
    assert len({byte_level.fingerprint(), llama2.fingerprint(), other.fingerprint()}) == 3

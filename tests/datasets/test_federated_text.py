"""Vocabularies and sequences, against values worked out by hand."""

import numpy as np
import pytest

from fedjax_lab.datasets import text


def test_the_shakespeare_vocabulary_has_90_symbols_in_the_published_order():
    chars = text.char_vocabulary()
    assert chars.size == 90
    assert chars.symbols[:5] == ("<pad>", "<bos>", "<eos>", "d", "h")
    assert (chars.index["d"], chars.index["\r"], chars.oov) == (3, 88, 89)
    assert len(set(chars.symbols)) == 90


def test_characters_are_joined_and_cut_without_losing_one():
    a, b, c, d, e = (text.char_vocabulary().index[s] for s in "ABCDE")
    out = text.encode_characters(["ABCD", b"E"], length=3)
    np.testing.assert_array_equal(out["x"], [[1, a, b], [c, d, 2], [1, e, 0]])
    np.testing.assert_array_equal(out["y"], [[a, b, c], [d, 2, 1], [e, 2, 0]])
    assert out["x"].dtype == out["y"].dtype == np.int32


@pytest.mark.parametrize("count", [0, 1, 77, 78, 79, 80, 158, 159, 500])
def test_every_character_is_predicted_exactly_once(count):
    words = text.char_vocabulary()
    written = ("to be or not to be, " * 30)[:count]
    out = text.encode_characters(written)
    assert out["x"].shape == out["y"].shape == (-(-(count + 1) // 80), 80)
    flat = out["y"].ravel()
    assert words.names(flat[flat > 0]) == [*written, "<eos>"]
    np.testing.assert_array_equal(out["x"].ravel()[1 : count + 1], flat[:count])


def test_no_text_gives_no_rows_and_unknown_characters_one_symbol_each():
    assert text.encode_characters([])["x"].shape == (0, 80)
    out = text.encode_characters("é→~\udc80")["y"][0]
    np.testing.assert_array_equal(out[:6], [89, 89, 89, 89, 2, 0])


def test_words_are_numbered_padded_and_cut_as_published():
    words = text.word_vocabulary(["the", "cat", "sat", "rare"], size=3)
    assert words.size == 7 and words.oov == 6
    out = text.encode_words(["the cat purrs", b"sat sat sat sat sat", ""], words, length=4)
    np.testing.assert_array_equal(out["x"], [[1, 3, 4, 6], [1, 5, 5, 5], [1, 0, 0, 0]])
    np.testing.assert_array_equal(out["y"], [[3, 4, 6, 2], [5, 5, 5, 5], [2, 0, 0, 0]])


def test_bag_of_words_counts_unknown_words_in_the_denominator():
    out = text.bag_of_words([b"a b a z", "", "z z"], ["a", "b", "c"])
    np.testing.assert_array_equal(out, [[0.5, 0.25, 0], [0, 0, 0], [0, 0, 0]])
    assert out.dtype == np.float32


def test_tags_are_zeros_and_ones():
    out = text.multi_hot([b"java|c++|java|obscure", ""], ["c++", "java", "sql"])
    np.testing.assert_array_equal(out, [[1, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text.vocabulary([]), "at least one symbol"),
        (lambda: text.vocabulary(["a", "b", "a"]), "'a' more than once"),
        (lambda: text.word_vocabulary(["a"], size=0), "number of words must be positive"),
        (lambda: text.encode_characters("abc", length=0), "length of a sequence must be positive"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

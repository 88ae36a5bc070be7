"""Vocabularies and fixed-length sequences for the language tasks: Shakespeare and Stack Overflow.

All symbols are numbered alike: 0 pads, 1 begins a text, 2 ends it, the known symbols follow in the
vocabulary's order, and the last number stands for everything else. Next-symbol prediction has
``y[t] = x[t + 1]``; positions where ``y`` is 0 are padding and carry no loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fedjax_lab import checks

PAD, BOS, EOS = 0, 1, 2
FIRST = 3  # the number of a vocabulary's first symbol

# The 86 characters of the Shakespeare task, in the order that TFF's tutorial and FedJAX number
# them, so that their trained models can be used here.
_CHARACTERS = "dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"


class Vocabulary(NamedTuple):
    """Numbered symbols.

    Attributes:
      symbols: every symbol's name by its number, the four special ones included.
      index: known symbol -> number; anything else is :attr:`oov`.
    """

    symbols: tuple[str, ...]
    index: Mapping[str, int]

    @property
    def size(self) -> int:
        """How many numbers there are: the classes of a next-symbol model."""
        return len(self.symbols)

    @property
    def oov(self) -> int:
        """The number of whatever the vocabulary does not know; the last one."""
        return len(self.symbols) - 1

    def names(self, numbers: Iterable[int]) -> list[str]:
        """The symbols with these numbers, to read a sequence."""
        return [self.symbols[int(n)] for n in numbers]


def vocabulary(known: Sequence[str]) -> Vocabulary:
    """A vocabulary of these symbols, in this order. ValueError for none, or for one twice."""
    if not known:
        raise ValueError("a vocabulary needs at least one symbol; got none")
    index = {symbol: FIRST + i for i, symbol in enumerate(known)}
    if len(index) != len(known):
        twice = next(s for i, s in enumerate(known) if index[s] != FIRST + i)
        raise ValueError(f"the vocabulary holds {twice!r} more than once")
    return Vocabulary(("<pad>", "<bos>", "<eos>", *known, "<oov>"), index)


def char_vocabulary() -> Vocabulary:
    """The 90 symbols of the Shakespeare task: pad, bos, eos, 86 characters, everything else.

    Source: McMahan et al. 2017, section 3 (next-character prediction); the characters and their
    order are those of TensorFlow Federated's text-generation tutorial, which FedJAX uses too.
    """
    return vocabulary(_CHARACTERS)


def word_vocabulary(words: Sequence[str], size: int = 10_000) -> Vocabulary:
    """The first ``size`` words, most frequent first, with the special symbols: 10,004 in all."""
    checks.positive(size, "the number of words", integer=True)
    return vocabulary(words[:size])


def encode_characters(text: str | bytes | Iterable[str | bytes], length: int = 80) -> dict[str, np.ndarray]:
    """Sequences for next-character prediction, without losing a character between them.

    Each text gets a begin and an end; all are joined, one after the other, and cut every ``length``
    symbols. With ``length=3`` the texts ``["ABCD", "E"]`` give

    ====  ====================================================
    x     ``[bos A B] [C D eos] [bos E pad]``
    y     ``[A B C] [D eos bos] [E eos pad]``
    ====  ====================================================

    Args:
      text: one text or several of one client, as characters or as bytes.
      length: symbols in a sequence.

    Returns:
      ``{"x": int32[rows, length], "y": int32[rows, length]}``, numbered by :func:`char_vocabulary`,
      padded with 0. No text gives no rows.
    """
    checks.positive(length, "the length of a sequence", integer=True)
    texts = [text] if isinstance(text, str | bytes) else list(text)
    table = _character_table()
    pieces = [np.concatenate([[BOS], table[_code_points(t)], [EOS]]) for t in texts]
    joined = np.concatenate(pieces) if pieces else np.zeros(1, np.int32)
    rows = -(-(len(joined) - 1) // length)
    x, y = np.zeros(rows * length, np.int32), np.zeros(rows * length, np.int32)
    x[: len(joined) - 1], y[: len(joined) - 1] = joined[:-1], joined[1:]
    return {"x": x.reshape(rows, length), "y": y.reshape(rows, length)}


def encode_words(sentences: Sequence[str | bytes], words: Vocabulary, length: int = 20) -> dict[str, np.ndarray]:
    """One next-word sequence a sentence: its first ``length`` words, or all of them and an end.

    Args:
      sentences: words with spaces between them.
      words: from :func:`word_vocabulary`.
      length: symbols in a sequence.

    Returns:
      ``{"x": int32[sentences, length], "y": int32[sentences, length]}``: ``x`` begins with bos,
      ``y`` is one word ahead. Source: Reddi et al. 2021, "Adaptive Federated Optimization",
      appendix C.
    """
    checks.positive(length, "the length of a sequence", integer=True)
    x, y = np.zeros((2, len(sentences), length), np.int32)
    for row, sentence in enumerate(sentences):
        numbers = [words.index.get(w, words.oov) for w in _text(sentence).split()[:length]]
        numbers = [BOS, *numbers, EOS][: length + 1]
        x[row, : len(numbers) - 1], y[row, : len(numbers) - 1] = numbers[:-1], numbers[1:]
    return {"x": x, "y": y}


def bag_of_words(sentences: Sequence[str | bytes], words: Sequence[str]) -> np.ndarray:
    """How often each word occurs, as a share of all words of the sentence, unknown ones included.

    Returns:
      ``float32[sentences, words]``; a sentence without a word is all zeros.
    """
    index = {word: i for i, word in enumerate(words)}
    out = np.zeros((len(sentences), len(words)), np.float32)
    for row, sentence in enumerate(sentences):
        tokens = _text(sentence).split()
        columns = [index[t] for t in tokens if t in index]
        np.add.at(out[row], columns, np.float32(1))
        out[row] /= max(len(tokens), 1)
    return out


def multi_hot(labels: Sequence[str | bytes], known: Sequence[str], separator: str = "|") -> np.ndarray:
    """Which of the known labels each row has: ``float32[rows, known]`` of zeros and ones."""
    index = {name: i for i, name in enumerate(known)}
    out = np.zeros((len(labels), len(known)), np.float32)
    for row, text in enumerate(labels):
        out[row, [index[t] for t in _text(text).split(separator) if t in index]] = 1
    return out


def _text(sentence: str | bytes) -> str:
    # Latin-1 takes any byte: the corpus is ASCII, and a stray byte makes an unknown word.
    return sentence.decode("latin-1") if isinstance(sentence, bytes) else sentence


def _code_points(text: str | bytes) -> np.ndarray:
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8).astype(np.int64)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.minimum(points, 256).astype(np.int64)


def _character_table() -> np.ndarray:
    """``int32[257]``: the number of each byte; the last entry serves all code points above 255."""
    known = char_vocabulary()
    table = np.full(257, known.oov, np.int32)
    for character, number in known.index.items():
        table[ord(character)] = number
    return table

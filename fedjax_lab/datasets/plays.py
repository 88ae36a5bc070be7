"""Roles of plays in plain text: each speaker of each play is a client that is to predict its text.

The parser knows the three ways in which Project Gutenberg's editions mark a speaker, and takes for
each play the one that is most frequent in it: ``HAMLET.``, ``HAMLET`` and ``Ham.``, alone on a line.
Headings of acts, scenes, prologues and epilogues end a speech, stage directions are left out, and
so is everything before the first heading (the list of persons).
"""

import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from fedjax_lab import checks, reading
from fedjax_lab.data import FederatedData, Split
from fedjax_lab.datasets import stored_files, text

_WORDS = "and|of|the|de|AND|OF|THE"
_CAPITALS = re.compile(rf"(?:[0-9]\.? )?(?:[A-Z][A-Z'-]*[.,&]?|&|{_WORDS})(?: (?:[A-Z][A-Za-z'-]*[,&]?|&|{_WORDS}))*")
_CAPITALIZED = re.compile(rf"(?:[0-9]\.? )?[A-Z][a-z]*(?: (?:[A-Z][a-z]*|{_WORDS}))*")
_SECTION = re.compile(
    r"(?:ACT|SCENE)(?: (?:[IVX]+|[0-9]+|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b|[.:,-]|$)"
    r"|(?:THE )?(?:PROLOGUE|EPILOGUE|INDUCTION|SONG|DUMB SHOW|END|ORDER OF THE CORONATION)\.?$",
    re.IGNORECASE,
)
_DIRECTION = re.compile(r"(?:\[|\{)[^\[\]{}]*(?:\]|\})")
_MOVEMENT = re.compile(r"(?:Enter|Re-enter|Exit|Exeunt|Flourish|Alarum|Alarums)\b")
_STANZA = re.compile(r"[IVX]+\.?")
_LONGEST_NAME = 45  # characters; a longer line is speech


class Speech(NamedTuple):
    """One speech of a role.

    Attributes:
      role: the speaker as the play names it, in capitals and without the full stop.
      lines: what is said, line by line, without stage directions.
    """

    role: str
    lines: tuple[str, ...]


def shakespeare_plays(data_dir: str | os.PathLike | None = None, *, length: int = 80, min_lines: int = 2) -> Split:
    """Next-character prediction for the roles of plays in plain text, as in McMahan et al. 2017.

    A client is one role of one play with at least ``min_lines`` lines; the first 80 percent of its
    lines are for training and the others for testing, so that the test text comes later. Joint
    speakers that the text marks as one (``ALL``, ``BOTH``) are roles of their own. The 37 plays of
    Shakespeare that the paper used give 1,146 roles there; editions mark speakers differently.

    Args:
      data_dir: a folder of plays, one ``.txt`` or ``.txt.gz`` file each, or one with a folder
        ``shakespeare``; by default FEDJAX_LAB_DATA or ``~/.cache/fedjax_lab``.
      length: characters of a sequence.
      min_lines: roles with fewer are left out; at least 2.

    Returns:
      ``Split(train, test)`` with ids such as ``"hamlet/OPH"`` and the fields ``x: int32[length]`` and
      ``y: int32[length]``, which is one character ahead. The 90 symbols are those of
      :func:`fedjax_lab.datasets.text.char_vocabulary`: 0 pads, and where ``y`` is 0 nothing is to be
      predicted; 1 and 2 begin and end a speech; 89 is any character that isn't known.

    Raises:
      FileNotFoundError: no play is in any of the folders.
      ValueError: naming the file: damaged, not UTF-8, or without a speaker.
    """
    checks.positive(length, "length", integer=True)
    if min_lines < 2:
        raise ValueError(f"a role needs two lines, one to train and one to test; got {min_lines}")
    train, test = [], []
    for path in _plays(data_dir):
        play = re.sub(r"(_gut)?\.txt(\.gz)?$", "", path.name)
        for role, speeches in by_role(read_play(path)).items():
            count = sum(len(s.lines) for s in speeches)
            if count >= min_lines:
                first, last = _cut(speeches, count * 4 // 5)
                train.append((f"{play}/{role}", text.encode_characters(first, length)))
                test.append((f"{play}/{role}", text.encode_characters(last, length)))
    return Split(FederatedData.from_clients(train), FederatedData.from_clients(test))


def by_role(speeches: list[Speech]) -> dict[str, list[Speech]]:
    """The speeches of each role, in the order of the first ones."""
    roles: dict[str, list[Speech]] = {}
    for speech in speeches:
        roles.setdefault(speech.role, []).append(speech)
    return roles


def read_play(path: str | os.PathLike) -> list[Speech]:
    """All speeches of a play, in order. ValueError, naming the file, if nobody speaks in it."""
    lines = [" ".join(line.split()) for line in reading.read_text(path).split("\n")]
    sections = [i for i, line in enumerate(lines) if _SECTION.match(line)]
    starts = [i for i in sections if not lines[i].upper().startswith("SCENE")]  # a list may name it
    body = lines[starts[0] :] if starts else lines
    known = _speakers(body)
    speeches = list(_speeches(body, known))
    if not speeches:
        raise ValueError(f"{path}: no speaker found; a speaker's name stands alone on a line, as 'HAMLET.'")
    return speeches


def _speakers(lines: list[str]) -> set[str]:
    """The names that stand alone on a line behind an empty one, in the play's own style."""
    styles: list[Counter[str]] = [Counter(), Counter(), Counter()]
    for before, line, after in zip(["", *lines], lines, [*lines[1:], ""], strict=False):
        bare = _DIRECTION.sub("", line).strip()
        if before or _is_section(bare, after) or not _is_name(bare):
            continue
        name = bare.removesuffix(".")
        if _CAPITALS.fullmatch(name) and len(name) > 1 and _mostly_capitals(name):
            styles[0 if bare != name else 1][name.upper()] += 1
        elif bare != name and _CAPITALIZED.fullmatch(name) and after:
            styles[2][name.upper()] += 1
    return set(max(styles, key=lambda style: style.total()))


def _is_name(line: str) -> bool:
    return 0 < len(line) <= _LONGEST_NAME and not _STANZA.fullmatch(line)


def _mostly_capitals(name: str) -> bool:
    # A name may have small letters, as in "ANN and BOB" or, misprinted, "LADY FalcoNBRIDGE".
    return sum(map(str.isupper, name)) > sum(map(str.islower, name))


def _is_section(line: str, after: str) -> bool:
    # "PROLOGUE" with text right below it is a role: of the play within the play.
    return bool(_SECTION.match(line)) and not (after and re.match(r"(PRO|EPI)LOGUE", line))


def _speeches(lines: list[str], known: set[str]) -> Iterator[Speech]:
    role, said = None, []
    for block in _paragraphs(lines, known):
        name, rest = _heading(block, known)
        section = _is_section(block[0], block[1] if len(block) > 1 else "")
        if name or section:
            if role and said:
                yield Speech(role, tuple(said))
            role, said = name, []
        if role and not section:
            said += _spoken(rest, follows_heading=bool(name))
    if role and said:
        yield Speech(role, tuple(said))


def _paragraphs(lines: list[str], known: set[str]) -> Iterator[list[str]]:
    """Lines between empty ones; a speaker's name in capitals begins one in any case."""
    block: list[str] = []
    for line in [*lines, ""]:
        named = line.isupper() and line.removesuffix(".") in known
        if block and (named or not line):
            yield block
            block = []
        if line:
            block.append(line)


def _heading(block: list[str], known: set[str]) -> tuple[str | None, list[str]]:
    """The speaker that a paragraph begins with, if any, and the lines of the paragraph's speech."""
    first = _DIRECTION.sub("", block[0]).strip()
    name = first.removesuffix(".").upper()
    if name in known and _is_name(first):
        return name, block[1:]
    inline = re.match(r"([^.]{2,40})\. +(?=\S)", block[0])  # HAMLET. [Aside.] or HAMLET. To be,
    if inline and inline[1].isupper() and inline[1] in known:
        return inline[1], [block[0][inline.end() :], *block[1:]]
    return None, block


def _spoken(lines: list[str], follows_heading: bool) -> list[str]:
    """A paragraph's lines without stage directions."""
    if lines and not follows_heading and _MOVEMENT.match(lines[0]):
        return []
    joined, last = "\n".join(lines), None
    while joined != last:  # directions inside directions
        joined, last = _DIRECTION.sub("", joined), joined
    joined = re.split(r"[\[{]", joined)[0]  # one that is never closed ends with the paragraph
    return [line.strip() for line in joined.split("\n") if line.strip(" ]}")]


def _cut(speeches: list[Speech], count: int) -> tuple[list[str], list[str]]:
    """The texts of the first ``count`` lines and of the others; a speech may be cut in two."""
    first, last = [], []
    for speech in speeches:
        head, tail = speech.lines[:count], speech.lines[count:]
        count -= len(head)
        first += ["\n".join(head)] if head else []
        last += ["\n".join(tail)] if tail else []
    return first, last


def _plays(data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
    folders = stored_files.data_folders(data_dir, "shakespeare")
    for folder in folders:
        plays = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.gz")])
        if plays:
            return plays
    raise FileNotFoundError(
        f"no play (.txt or .txt.gz) is in any of the folders {', '.join(map(str, folders))}. Put plays in plain text, "
        "for instance Project Gutenberg's, in a folder and pass it as data_dir; or use "
        "fl.datasets.shakespeare_federated, which is downloaded"
    )

"""Roles of plays: the three ways of marking a speaker, sections, stage directions, and sequences."""

import gzip

import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab.datasets import plays, text
from tests.damage import flips, outcomes, truncations

FRONT = "A PLAY\n\nPERSONS REPRESENTED.\n\nANN, a Queen.\nBOB.\nScene.--Bath.\n\n\n"

CAPITALS = (
    FRONT
    + """ACT I.

SCENE I. Bath. A room, with
a window.

[Enter ANN and two
[BRITISH] lords.]

ANN.
Good day. [Aside.] He comes.
  Sit, sir.

[Exit a lord.]

Farewell.

BOB. [Kneeling.]
Madam!
ANN.
Rise.

FIRST LORD.

[Aside.]

Hum.

BOB. I say no.

Enter a Messenger.

MRS. HILL.
A letter.

Bob.
Thanks.

      III.

with a song.

SCENE II.

The same.

EPILOGUE

Nobody says this.

ANN.
The end[she weeps
for joy
"""
)


def _speeches(tmp_path, content):
    path = tmp_path / "play.txt"
    path.write_text(content)
    return [(s.role, list(s.lines)) for s in plays.read_play(path)]


def test_names_in_capitals(tmp_path):
    assert _speeches(tmp_path, CAPITALS) == [
        ("ANN", ["Good day.  He comes.", "Sit, sir.", "Farewell."]),
        ("BOB", ["Madam!"]),
        ("ANN", ["Rise."]),
        ("FIRST LORD", ["Hum."]),
        ("BOB", ["I say no."]),
        ("MRS. HILL", ["A letter."]),
        ("BOB", ["Thanks.", "III.", "with a song."]),
        ("ANN", ["The end"]),
    ]


def test_names_in_capitals_without_a_full_stop(tmp_path):
    content = FRONT + "ACT I\n\nANN\nOne.\n\nBOB\nTwo.\n\nPROLOGUE\nA role in the play's play.\n\nTEN ARE THE\nYEARS.\n"
    assert _speeches(tmp_path, content)[:3] == [
        ("ANN", ["One."]),
        ("BOB", ["Two."]),
        ("PROLOGUE", ["A role in the play's play."]),
    ]


def test_abbreviated_names(tmp_path):
    content = FRONT + (
        "ACT I.\n\nScene I. Bath.\n\nHam.\nWords.\nSaid he.\n\nFirst Serv.\nMy lord.\n\n"
        "[Enter Ham.]\n\nSo it is, so it is.\n\nRos and Guil.\nHam.--no.\n\nI Play.\nAye.\n"
    )
    assert _speeches(tmp_path, content) == [
        ("HAM", ["Words.", "Said he."]),
        ("FIRST SERV", ["My lord.", "So it is, so it is."]),
        ("ROS AND GUIL", ["Ham.--no."]),
        ("I PLAY", ["Aye."]),
    ]


def test_a_text_without_speakers_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"play.txt: no speaker found"):
        _speeches(tmp_path, "once upon a time\n\nthere was\n")


@pytest.fixture
def two_plays(tmp_path):
    folder = tmp_path / "shakespeare"
    folder.mkdir()
    lines = [f"line {i}" for i in range(11)]
    speech = lambda name, said: f"{name}.\n" + "\n".join(said) + "\n\n"
    one = "ACT I.\n\n" + speech("ANN", lines[:4]) + speech("BOB", ["only one"]) + speech("ANN", lines[4:])
    (folder / "one_gut.txt.gz").write_bytes(gzip.compress(one.encode(), mtime=0))
    (folder / "two.txt").write_text("ACT I.\n\n" + speech("ANN", ["a", "b"]))
    return tmp_path


def _texts(client):
    vocabulary = text.char_vocabulary()
    batch, mask = client.full()
    stream = np.asarray(batch["y"])[np.asarray(mask)].ravel()
    return "".join(vocabulary.names(stream[stream != 0]))


def test_the_last_fifth_of_a_roles_lines_is_for_testing(two_plays):
    train, test = fl.datasets.shakespeare_plays(two_plays, length=8)
    assert list(train.ids) == list(test.ids) == ["one/ANN", "two/ANN"]  # BOB has a single line
    lines = [f"line {i}" for i in range(11)]
    first = "\n".join(lines[:4]) + "<eos><bos>" + "\n".join(lines[4:8]) + "<eos>"
    assert _texts(train.client("one/ANN")) == first  # 8 of 11: the test part is rounded up
    assert _texts(test.client("one/ANN")) == "\n".join(lines[8:]) + "<eos>"
    assert (_texts(train.client("two/ANN")), _texts(test.client("two/ANN"))) == ("a<eos>", "b<eos>")


def test_y_is_x_one_character_ahead(two_plays):
    train, _ = fl.datasets.shakespeare_plays(two_plays, length=8)
    batch, mask = train.client("one/ANN").full()
    x, y = (np.asarray(batch[n])[np.asarray(mask)].ravel() for n in ("x", "y"))
    np.testing.assert_array_equal(x[1:][x[1:] != 0], y[:-1][x[1:] != 0])
    assert x[0] == text.BOS and x.dtype == y.dtype == np.int32 and x.max() < 90


def test_bad_arguments_and_missing_plays(two_plays, tmp_path):
    with pytest.raises(ValueError, match="length must be positive"):
        fl.datasets.shakespeare_plays(two_plays, length=0)
    with pytest.raises(ValueError, match="a role needs two lines"):
        fl.datasets.shakespeare_plays(two_plays, min_lines=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no play .*Project Gutenberg"):
        fl.datasets.shakespeare_plays(tmp_path / "empty")


def test_50_flips_and_truncations_of_a_play_are_named_or_harmless(two_plays):
    path = two_plays / "shakespeare" / "one_gut.txt.gz"
    read = lambda: fl.datasets.shakespeare_plays(two_plays, length=8).train.arrays["x"].tobytes()
    intact = read()
    for copies in (truncations(path.read_bytes()), flips(path.read_bytes())):
        for what, result in outcomes(path, copies, read):
            assert result == intact or (isinstance(result, ValueError) and str(path) in str(result)), what


def test_the_37_plays(data_dir):
    train, test = fl.datasets.shakespeare_plays(data_dir)
    assert len({name.split("/")[0] for name in train.ids}) == 37
    assert 1100 < train.num_clients < 1300  # 1,146 in McMahan et al. 2017, from another edition
    assert np.asarray(train.sizes).min() >= 1 and np.asarray(test.sizes).min() >= 1
    roles = {name.split("/")[1] for name in train.ids}
    assert not roles & {"ACT I", "SCENE I", "III", "IV", "PROLOGUE.", "SONG", "DRAMATIS PERSONAE"}
    # Hamlet, in an edition that abbreviates; Oberon, in one without full stops; Rosalind.
    for role in ("hamlet/HAM", "midsummer_nights_dream/OBERON", "as_you_like_it/ROSALIND"):
        assert role in train.ids
    assert _texts(train.client("hamlet/OPH")).startswith("Do you doubt that?<eos><bos>No more but so?<eos>")
    known = np.asarray(train.arrays["x"])
    assert (known == 89).mean() < 1e-4  # almost no character is outside the vocabulary
    share = test.num_examples / (test.num_examples + train.num_examples)
    assert 0.19 < share < 0.22

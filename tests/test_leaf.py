"""LEAF's JSON folders: contents, consistency, and damage named with file and line."""

import gzip
import json

import numpy as np
import pytest

import fedjax_lab as fl
from tests.damage import flips, outcomes, truncations

USERS = {
    "u2": {"x": [[1, 2.5], [3, 4]], "y": [0, 2]},
    "u10": {"x": [[5, 6]], "y": [1]},
}


def _content(data, **changes):
    whole = {"users": list(data), "num_samples": [len(u["y"]) for u in data.values()], "user_data": data}
    return json.dumps(whole | changes, indent=1)


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.json").write_text(_content(USERS))
    return tmp_path


def test_a_folder_becomes_a_split_over_the_same_users(folder):
    (folder / "train" / "b.json").write_text(_content({"u3": {"x": [[7, 8]], "y": [3.0]}}))
    (folder / "test" / "a.json").write_text(_content({"late": USERS["u10"], "u2": USERS["u2"]}))
    train, test = fl.datasets.leaf(folder)
    assert list(train.ids) == list(test.ids) == ["u2", "u10", "u3", "late"]
    assert train.sizes.tolist() == [2, 1, 1, 0] and test.sizes.tolist() == [2, 0, 0, 1]
    np.testing.assert_array_equal(train.arrays["x"], [[1, 2.5], [3, 4], [5, 6], [7, 8]])
    assert train.arrays["x"].dtype == np.float32
    assert train.arrays["y"].dtype == np.int32 and train.arrays["y"].tolist() == [0, 2, 1, 3]


def test_gzipped_files_are_read_too(folder):
    (folder / "train" / "b.json.gz").write_bytes(gzip.compress(_content({"u3": USERS["u2"]}).encode()))
    assert fl.datasets.leaf(folder).train.num_clients == 3


def test_real_labels_stay_real(folder):
    (folder / "test" / "a.json").write_text(_content({"u2": {"x": [[1, 2]], "y": [0.5]}}))
    train, test = fl.datasets.leaf(folder)
    assert train.arrays["y"].dtype == test.arrays["y"].dtype == np.float32


def test_a_user_without_examples_is_empty(folder):
    (folder / "test" / "a.json").write_text(_content(USERS | {"idle": {"x": [], "y": []}}))
    train, test = fl.datasets.leaf(folder)
    assert train.sizes.tolist() == [2, 1, 0] and test.sizes.tolist() == [2, 1, 0]


def test_text_needs_an_encoder(folder):
    words = {"u1": {"x": ["to be", "or not"], "y": ["a", "b"]}, "u2": {"x": [], "y": []}}
    for part in ("train", "test"):
        (folder / part / "a.json").write_text(_content(words))

    def encode(x, y):
        lengths = np.array([[len(text)] for text in x], np.int32).reshape(-1, 1)
        return {"length": lengths, "y": np.array([ord(c) for c in y], np.int32)}

    with pytest.raises(ValueError, match=r"a.json, user 'u1': field 'x' holds text, not numbers: give encode="):
        fl.datasets.leaf(folder)
    train, _ = fl.datasets.leaf(folder, encode=encode)
    assert train.arrays["length"].tolist() == [[5], [6]] and train.sizes.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"user 'u1': encode gave 1 rows for 2 examples"):
        fl.datasets.leaf(folder, encode=lambda x, y: {"x": np.zeros((len(x[:1]), 1))})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_content(USERS, num_samples=[2, 2]), "user 'u10': field 'x' has 1 entries, but 'num_samples' says 2"),
        (_content(USERS, num_samples=[2]), "2 users, but 1 entries in 'num_samples'"),
        (_content(USERS, users=["u2", "u2"]), "client id 'u2' occurs more than once"),
        (_content(USERS, users=["u2", 7]), "'users' holds something that is not text"),
        (_content(USERS, users=["u2", "who"]), "user 'u10' has data but is not listed"),
        (_content(USERS, users=["u2", "u10", "u4"], num_samples=[2, 1, 1]), "user 'u4' is listed but has no data"),
        (_content({"u1": {"x": [[1, 2], [3]], "y": [0, 1]}}), "user 'u1': the entries of field 'x' differ in length"),
        (_content({"u1": {"x": [[1, 2]], "y": [0, 1]}}), "field 'x' has 1 entries"),
        (_content({"u1": {"x": [[1]], "y": [0]}}), "example of user .* has the shapes"),
        (_content({"u1": {"x": [[1, "a"]], "y": [0]}}), "field 'x' holds text"),
        (_content({"u1": {"x": [[1, None]], "y": [0]}}), "field 'x' holds text"),
        (_content({"u1": {"x": [[1, 1e39]], "y": [0]}}), "field 'x', entry 0, is not a finite 32-bit"),
        (_content({"u1": {"y": [0]}}), "user 'u1': field 'x' is missing"),
        (_content({"u1": {"x": 3, "y": [0]}}), "field 'x' is missing, or no list"),
        ("[1, 2]", "files hold an object"),
        ('{"users": []}', "field 'num_samples' is missing"),
        (_content(USERS).replace("2.5", "NaN"), "NaN in line 15 is not a number"),
        (_content(USERS).replace('"u10": {', '"u2": {'), "the name 'u2' occurs twice"),
        (_content(USERS).replace("]", "", 1), r"line 6, column \d+: not JSON, or cut off"),
        ("[" * 100_000, "recursion|nested|not JSON"),
    ],
)
def test_inconsistent_files_are_named(folder, content, message):
    path = folder / "train" / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        fl.datasets.leaf(folder)
    assert str(folder if "shapes" in message else path) in str(error.value)


def test_a_user_in_two_files_is_named(folder):
    (folder / "train" / "b.json").write_text(_content({"u2": USERS["u2"]}))
    with pytest.raises(ValueError, match=r"b.json: user 'u2' is also in .*a.json"):
        fl.datasets.leaf(folder)


def test_missing_folders_and_files(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no folder .*; LEAF's folders have 'train' and 'test'"):
        fl.datasets.leaf(tmp_path / "nowhere")
    (folder / "test" / "a.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"test has no .json file"):
        fl.datasets.leaf(folder)
    (folder / "test" / "a.json").write_text(_content({}))
    with pytest.raises(ValueError, match="test: none of the 2 users has an example"):
        fl.datasets.leaf(folder)


def test_50_truncations_are_named_with_their_line(folder):
    path = folder / "train" / "a.json"
    for what, error in outcomes(path, truncations(path.read_bytes()), lambda: fl.datasets.leaf(folder)):
        assert isinstance(error, ValueError) and str(path) in str(error), what
        assert "line" in str(error) or "empty" in str(error), what


def test_50_flips_are_named_or_leave_a_consistent_file(folder):
    # JSON has no checksum: a flipped digit is another number. Whatever is accepted agrees with its own
    # counts and with the test folder's shapes.
    path, named = folder / "train" / "a.json", 0
    for what, result in outcomes(path, flips(path.read_bytes(), 100), lambda: fl.datasets.leaf(folder)):
        if isinstance(result, ValueError):
            named += 1
            assert str(folder) in str(result), what
        else:
            assert result.train.num_examples == 3 and result.train.arrays["x"].shape == (3, 2), what
    assert named > 40

"""tf.train.Example and TFF's tables, against Google's protobuf library and contradictions."""

import tracemalloc

import numpy as np
import pytest

from fedjax_lab.datasets import sqlite_reading, tf_example, tff_sqlite
from fedjax_lab.datasets.tf_example import Field
from tests.datasets import federated_files as files

EMNIST = {"pixels": Field("float", (28, 28)), "label": Field("int")}
WORDS = {"tokens": Field("bytes"), "score": Field("int")}


@pytest.fixture
def tff(tmp_path):
    clients = files.emnist()
    return files.write_tff(tmp_path / "e.sqlite", {"all_train": clients, "all_test": clients}), clients


# ---- tf.train.Example ----


def test_every_kind_of_feature_as_protobuf_serializes_it():
    integers = [0, 1, 127, 128, 255, 2**31, 2**63 - 1, -1, -(2**63)]
    floats = np.float32([0, -1.5, np.nan, np.inf, 1e-45])
    message = files.example(i=integers, f=floats, b=b"\0text", one=-7, other=b"skipped")
    fields = {"i": Field("int", (3, 3)), "f": Field("float", (5,)), "b": Field("bytes")}
    out = tf_example.parse(message, fields | {"one": Field("int")})
    np.testing.assert_array_equal(out["i"], np.reshape(integers, (3, 3)))
    np.testing.assert_array_equal(out["f"], floats)
    assert (out["b"], out["one"]) == (b"\0text", -7)
    assert out["i"].dtype == np.int64 and out["f"].dtype == np.float32


def test_integers_of_every_length_agree_with_protobuf():
    rng = np.random.default_rng(0)
    values = rng.integers(-(2**63), 2**63, 500, np.int64) >> rng.integers(0, 63, 500)
    out = tf_example.parse(files.example(i=values), {"i": Field("int", (500,))})
    np.testing.assert_array_equal(out["i"], values)


def test_lists_that_are_not_packed_are_read_too():
    # int64_list { value: 3 value: 300 } and float_list { value: 1 }, with a tag for each value.
    integers = b"\x1a\x05\x08\x03\x08\xac\x02"
    floats = b"\x12\x05\x0d\x00\x00\x80\x3f"
    entries = b"".join(
        b"\x0a" + bytes([5 + len(value)]) + b"\x0a\x01" + name + b"\x12" + bytes([len(value)]) + value
        for name, value in ((b"i", integers), (b"f", floats))
    )
    message = b"\x0a" + bytes([len(entries)]) + entries
    assert files.example_class().FromString(message).features.feature["i"].int64_list.value == [
        3,
        300,
    ]
    out = tf_example.parse(message, {"i": Field("int", (2,)), "f": Field("float")})
    assert (out["i"].tolist(), out["f"]) == ([3, 300], 1.0)


@pytest.mark.parametrize(
    ("values", "field", "message"),
    [
        ({"x": 1}, Field("float"), "field 'x': holds int values; expected float"),
        ({"x": [1, 2]}, Field("int"), "field 'x': has 2 values; expected 1"),
        ({"x": np.ones(783)}, Field("float", (28, 28)), "field 'x': has 783 values; expected 784"),
        ({"y": 1}, Field("int"), r"field 'x' is missing; the example has \['y'\]"),
        ({}, Field("int"), r"field 'x' is missing; the example has \[\]"),
    ],
)
def test_an_example_of_another_form_is_named(values, field, message):
    with pytest.raises(ValueError, match=message):
        tf_example.parse(files.example(**values), {"x": field})


def test_a_doubled_field_is_refused():
    one = files.example(x=1)
    with pytest.raises(ValueError, match="field 'x' occurs twice"):
        tf_example.parse(one + one, {"x": Field("int")})


def test_no_truncation_of_an_example_passes():
    message = files.example(label=3, pixels=np.linspace(0, 1, 784).reshape(28, 28))
    for end in range(len(message)):
        with pytest.raises(ValueError, match=r"cut off|missing|no tf.train|without|values"):
            tf_example.parse(message[:end], EMNIST)


# ---- TFF's tables ----


@pytest.mark.parametrize("index", [True, False])
def test_tff_clients_are_read_one_by_one_with_or_without_an_index(tmp_path, index):
    clients = files.emnist()
    path = files.write_tff(tmp_path / "e.sqlite", {"a": clients, "b": files.emnist(1)}, index=index)
    # Rows of other clients and splits between a client's own: its rows don't adjoin.
    row = files.example(label=5, pixels=np.zeros((28, 28)))
    first = next(iter(clients))
    files.edit(
        path,
        ("INSERT INTO examples VALUES ('a', ?, ?)", (first, row)),
        f"UPDATE client_metadata SET num_examples = 3 WHERE split_name='a' AND client_id='{first}'",
    )
    with tff_sqlite.open_split(path, "a", EMNIST) as reader:
        assert reader.ids == tuple(sorted(clients)) == tff_sqlite.client_ids(path, "b")
        out = reader.read(first)
        np.testing.assert_array_equal(out["label"], [*clients[first]["label"], 5])
        np.testing.assert_array_equal(out["pixels"][:2], clients[first]["pixels"])
        assert reader.read(first, 1)["label"].tolist() == clients[first]["label"][:1].tolist()
        for client in reader.ids[1:]:
            np.testing.assert_array_equal(reader.read(client)["pixels"], clients[client]["pixels"])
        with pytest.raises(KeyError):
            reader.read("f9999_99")


def test_reading_a_client_by_its_index_does_not_scan_the_table(tff):
    path, clients = tff
    with sqlite_reading.connect(path) as connection:
        sqlite_reading.require(connection, tff_sqlite.TABLES)
        plan = connection.execute(
            f"EXPLAIN QUERY PLAN {tff_sqlite._OF_CLIENT}", ["all_train", next(iter(clients)), 9]
        ).fetchall()
    assert [row[3] for row in plan] == [
        b"SEARCH examples USING INDEX idx_examples_client_id_split (split_name=? AND client_id=?)"
    ]


def test_memory_is_that_of_one_client(tmp_path):
    clients = {f"c{k:03d}": {"tokens": strings_of(100_000), "score": [1]} for k in range(100)}
    path = files.write_tff(tmp_path / "s.sqlite", {"train": clients})
    assert path.stat().st_size > 10_000_000
    tracemalloc.start()
    with tff_sqlite.open_split(path, "train", WORDS) as reader:
        assert len(reader.read("c050")["tokens"][0]) == 100_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def strings_of(length):
    return [b"x" * length]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE client_metadata SET num_examples = 7", "examples has 2 rows; .* num_examples = 7"),
        (
            "UPDATE client_metadata SET num_examples = 1",
            "examples has more rows; .* num_examples = 1",
        ),
        (
            "UPDATE client_metadata SET num_examples = -1",
            "num_examples of client_metadata holds -1",
        ),
        ("UPDATE client_metadata SET num_examples = 'two'", "holds b'two'; expected a number"),
        ("UPDATE client_metadata SET client_id = CAST(x'ff' AS TEXT)", r"xff', which is not UTF-8"),
        ("UPDATE client_metadata SET client_id = 'same'", "lists client 'same' .* twice"),
        ("UPDATE client_metadata SET split_name = 'x'", r"no client of a split .*splits \['x'\]"),
        ("UPDATE examples SET serialized_example_proto = 5", "proto holds 5; expected bytes"),
        (
            "UPDATE examples SET serialized_example_proto = x'0000'",
            "example 0: the message is cut off or no protobuf",
        ),
        ("UPDATE examples SET client_id = 'other'", "examples has 0 rows"),
        ("DROP TABLE client_metadata", "no table 'client_metadata'; the file has"),
        ("ALTER TABLE examples RENAME COLUMN client_id TO id", "no stored column 'client_id'"),
    ],
)
def test_contradictions_in_tff_tables_are_named(tff, statement, message):
    path, clients = tff
    files.edit(path, statement)
    with pytest.raises(ValueError, match=message) as caught:
        tff_sqlite.read_client(path, "all_train", next(iter(clients)), EMNIST)
    assert str(path) in str(caught.value)


def test_an_unknown_client_gets_the_nearest_known_one(tff):
    with pytest.raises(KeyError, match="did you mean 'f0001_01'"):
        tff_sqlite.read_client(tff[0], "all_train", "f0001_1", EMNIST)

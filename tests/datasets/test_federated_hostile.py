"""FedJAX's tables, and databases made to do harm: nothing is executed, and errors are clear."""

import pickle
import sqlite3
import tracemalloc
import zlib

import msgpack
import numpy as np
import pytest

from fedjax_lab.datasets import fedjax_sqlite, sqlite_reading, tff_sqlite
from fedjax_lab.datasets.tf_example import Field
from tests.datasets import federated_files as files

EMNIST = {"pixels": Field("float", (28, 28)), "label": Field("int")}
WORDS = {"tokens": Field("bytes"), "score": Field("int")}


@pytest.fixture
def tff(tmp_path):
    clients = files.emnist()
    return files.write_tff(tmp_path / "e.sqlite", {"all_train": clients, "all_test": clients}), clients


@pytest.fixture
def fedjax(tmp_path):
    clients = files.emnist()
    return files.write_fedjax(tmp_path / "e.sqlite", clients), clients


# ---- FedJAX's table ----


def test_fedjax_clients_with_numbers_and_byte_strings(tmp_path):
    clients = {
        "b": {"tokens": files.strings("a b", "", "c"), "score": np.array([1, -2, 3])},
        "a": {"tokens": files.strings("z"), "score": np.array([9])},
        "none": {"tokens": files.strings(), "score": np.zeros(0, np.int64)},
    }
    path = files.write_fedjax(tmp_path / "s.sqlite", clients)
    assert fedjax_sqlite.client_ids(path) == ("a", "b", "none")
    with fedjax_sqlite.open_file(path, WORDS) as reader:
        assert reader.read("b")["tokens"] == [b"a b", b"", b"c"]
        assert reader.read("b")["score"].tolist() == [1, -2, 3]
        assert reader.read("b", 2)["tokens"] == [b"a b", b""]
        assert reader.read("none")["tokens"] == []


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "float16", "float32", "float64"])
def test_fedjax_arrays_of_every_type(tmp_path, dtype):
    value = np.arange(12).reshape(2, 3, 2).astype(dtype)
    path = files.write_fedjax(tmp_path / "s.sqlite", {"a": {"v": value}})
    kind = "float" if "float" in dtype else "int"
    out = fedjax_sqlite.read_client(path, "a", {"v": Field(kind, (3, 2))})["v"]
    np.testing.assert_array_equal(out, value)
    assert out.dtype == value.dtype


def packed(value, code=1):
    return zlib.compress(msgpack.packb({"pixels": msgpack.ExtType(code, msgpack.packb(value))}))


class Evil:
    """Unpickling it would leave a mark."""

    ran = False

    @staticmethod
    def mark():
        Evil.ran = True

    def __reduce__(self):
        return (Evil.mark, ())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(Evil()), "no zlib stream"),
        (zlib.compress(pickle.dumps(Evil())), "not msgpack of arrays|expected a map"),
        (b"", "truncated zlib stream"),
        (zlib.compress(b""), "not msgpack of arrays"),
        (zlib.compress(msgpack.packb([1, 2])), "holds a list; expected a map"),
        (zlib.compress(b"\x81" * 5000 + b"\x01"), "not msgpack of arrays"),
        (zlib.compress(b"\x91" * 100_000), "not msgpack of arrays"),
        (zlib.compress(msgpack.packb({})), r"field 'pixels' is missing; the client has \[\]"),
        (zlib.compress(msgpack.packb({"pixels": 1})), "'pixels' is not an array of float values"),
        (zlib.compress(msgpack.packb({})) + b"more", "4 bytes behind its zlib stream"),
        (packed([[1], "float32", b"0000"], code=99), "msgpack extension type 99 where an array"),
        (packed([1.0, 2.0], code=2), "a complex number where an array"),
        (packed([[], "float32", b"0000"], code=3), "a scalar where an array"),
        (packed([[1], "object", b"0" * 8]), "an array of dtype 'object'"),
        (packed([[1], "O", b"0" * 8]), "an array of dtype 'O'"),
        (packed([[1, 28, 28], "float32", b"0000"]), "with bytes of another length"),
        (packed([[2**62, 4], "float32", b""]), "with bytes of another length"),
        (packed([[-1], "float32", b""]), r"an array of shape \[-1\]"),
        (packed(["x", "float32", b""]), "an array of shape b'x'"),
        (packed([[1], "float32"]), r"an array that is not \(shape, dtype, bytes\)"),
        (packed([[2], [b"one"]], code=4), "byte strings that are not"),
        (packed([[1], [1]], code=4), "byte strings that are not"),
        (packed([[1], [b"one"]], code=4), "'pixels' is not an array of float values"),
        (packed([[1], "int32", b"0000"]), "dtype int32; expected float"),
        (packed([[1], "float32", b"0000"]), r"shape \(1,\); expected rows of \(28, 28\)"),
        (packed([[], "float32", b"0000"]), r"shape \(\); expected rows of \(28, 28\)"),
    ],
)
def test_hostile_fedjax_data_is_refused_and_nothing_runs(tmp_path, data, message):
    path = files.write_fedjax(tmp_path / "h.sqlite", {"good": files.emnist()["f0000_00"], "bad": data})
    fields = {"pixels": Field("float", (28, 28))}
    with fedjax_sqlite.open_file(path, fields) as reader:
        with pytest.raises(ValueError, match=message) as caught:
            reader.read("bad")
        assert str(path) in str(caught.value) and "'bad'" in str(caught.value)
        assert len(reader.read("good")["pixels"]) == 2
    assert not Evil.ran


def test_a_stream_that_decompresses_without_end_is_refused_early(tmp_path):
    bomb = zlib.compress(bytes(64_000_000))
    assert len(bomb) < 100_000
    path = files.write_fedjax(tmp_path / "bomb.sqlite", {"bomb": bomb})
    tracemalloc.start()
    with (
        fedjax_sqlite.open_file(path, {}, most_bytes=2**20) as reader,
        pytest.raises(ValueError, match="decompresses to more than 1048576 bytes"),
    ):
        reader.read("bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_fedjax_sizes_must_agree(fedjax):
    path, _ = fedjax
    files.edit(path, "UPDATE federated_data SET num_examples = num_examples + 1")
    with pytest.raises(ValueError, match="'pixels' has 1 rows; num_examples is 2"):
        fedjax_sqlite.read_client(path, "f0001_01", EMNIST)


# ---- databases that are programs ----

_ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS client_id, "


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (
            ["DROP TABLE examples", f"CREATE VIEW examples AS {_ENDLESS} 'a' AS split_name FROM n"],
            "'examples' is a view, not a plain table",
        ),
        (
            [
                "DROP TABLE examples",
                "CREATE VIRTUAL TABLE examples USING fts5(client_id, split_name)",
            ],
            "'examples' is a virtual table, not a plain table",
        ),
        (
            [
                "DROP TABLE client_metadata",
                "CREATE TABLE client_metadata (client_id TEXT, split_name TEXT, "
                "num_examples INTEGER AS (abs(-9223372036854775807)))",
            ],
            "no stored column 'num_examples'",
        ),
    ],
)
def test_views_virtual_tables_and_generated_columns_are_not_read(tff, statements, message):
    files.edit(tff[0], *statements)
    with pytest.raises(ValueError, match=message):
        tff_sqlite.client_ids(tff[0], "all_train")


def test_triggers_named_like_the_tables_do_nothing(tff):
    path, clients = tff
    files.edit(
        path,
        "CREATE TRIGGER client_metadata AFTER INSERT ON examples BEGIN DELETE FROM examples; END",
        "CREATE TRIGGER examples BEFORE DELETE ON examples BEGIN DELETE FROM client_metadata; END",
    )
    before = path.read_bytes()
    assert tff_sqlite.client_ids(path, "all_train") == tuple(clients)
    assert path.read_bytes() == before


def test_the_connection_can_only_read_columns(tff):
    with sqlite_reading.connect(tff[0]) as connection:
        sqlite_reading.require(connection, tff_sqlite.TABLES)
        for statement in (
            "DELETE FROM examples",
            "ATTACH DATABASE ':memory:' AS other",
            "SELECT load_extension('x')",
            "SELECT writefile('x', 'y')",
            "PRAGMA writable_schema=ON",
            "CREATE TEMP TABLE t (x)",
        ):
            with pytest.raises(sqlite3.DatabaseError, match=r"not authorized|prohibited|no such func"):
                connection.execute(statement)


def test_a_query_without_end_is_interrupted(tff):
    with sqlite_reading.connect(tff[0]) as connection:
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
        with pytest.raises(sqlite3.OperationalError, match="interrupted"):
            list(sqlite_reading.rows(connection, 1000, f"{endless} WHERE i < 0"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an SQLite database"),
        (b"SQLite format 3\0", "truncated after 16 bytes"),
        (b"PK\x03\x04" + bytes(200), "not an SQLite database"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "other.sqlite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught, sqlite_reading.connect(path):
        pass
    assert str(path) in str(caught.value)


def test_a_path_with_odd_characters_is_opened(tmp_path):
    folder = tmp_path / "a b?mode=rw#c%20"
    folder.mkdir()
    path = files.write_fedjax(folder / "x.sqlite", files.emnist())
    assert fedjax_sqlite.client_ids(path) == tuple(files.emnist())

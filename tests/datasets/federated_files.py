"""Writers of tiny files in exactly the formats that TFF and FedJAX publish.

The examples of TFF's files are serialized by Google's protobuf library, from descriptors made here,
so the reader's own decoder is tested against another implementation.
"""

import functools
import lzma
import sqlite3
import zlib

import msgpack
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


@functools.cache
def example_class():
    """tf.train.Example as a protobuf class (tensorflow/core/example/{example,feature}.proto)."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto

    def message(name, fields):
        out = file.message_type.add(name=name)
        for number, (field, label, type_, type_name) in enumerate(fields, 1):
            out.field.add(name=field, number=number, label=label, type=type_, type_name=type_name)
        return out

    repeated, one = kind.LABEL_REPEATED, kind.LABEL_OPTIONAL
    message("BytesList", [("value", repeated, kind.TYPE_BYTES, None)])
    message("FloatList", [("value", repeated, kind.TYPE_FLOAT, None)])
    message("Int64List", [("value", repeated, kind.TYPE_INT64, None)])
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    feature = message("Feature", [(n, one, kind.TYPE_MESSAGE, f".t.{t}") for n, t in lists])
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", [("feature", repeated, kind.TYPE_MESSAGE, ".t.Features.FeatureEntry")])
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=one, type=kind.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=kind.TYPE_MESSAGE, type_name=".t.Feature")
    message("Example", [("features", one, kind.TYPE_MESSAGE, ".t.Features")])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def example(**values) -> bytes:
    """A serialized tf.train.Example; bytes, floating and integer values find their lists."""
    out = example_class()()
    for name, value in values.items():
        feature = out.features.feature[name]
        flat = np.ravel(value)
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif flat.dtype.kind == "f":
            feature.float_list.value.extend(flat.tolist())
        else:
            feature.int64_list.value.extend(flat.tolist())
    return out.SerializeToString(deterministic=True)


def rows_of(client) -> list[dict]:
    """``{field: [values of all examples]}`` to one dict an example."""
    return [dict(zip(client, row, strict=True)) for row in zip(*client.values(), strict=True)]


def write_tff(path, splits, *, index=True, page_size=1024):
    """TFF's tables, indexes included. ``splits``: ``{split: {client: {field: values}}}``."""
    connection = sqlite3.connect(path)
    connection.executescript(
        f"""PRAGMA page_size={page_size};
        CREATE TABLE examples (split_name TEXT NOT NULL, client_id TEXT NOT NULL,
                               serialized_example_proto BLOB NOT NULL);
        CREATE TABLE client_metadata (client_id TEXT NOT NULL, split_name TEXT NOT NULL,
                                      num_examples INTEGER NOT NULL);"""
    )
    if index:
        connection.executescript(
            """CREATE INDEX idx_examples_client_id ON examples (client_id);
            CREATE INDEX idx_examples_client_id_split ON examples (split_name, client_id);
            CREATE INDEX idx_metadata_client_id ON client_metadata (client_id);"""
        )
    for split, clients in splits.items():
        for client, fields in clients.items():
            examples = rows_of(fields)
            connection.executemany(
                "INSERT INTO examples VALUES (?, ?, ?)",
                [(split, client, example(**row)) for row in examples],
            )
            connection.execute("INSERT INTO client_metadata VALUES (?, ?, ?)", (client, split, len(examples)))
    connection.commit()
    connection.close()
    return path


def packed_array(array) -> msgpack.ExtType:
    """FedJAX's two array extensions."""
    if array.dtype == object:
        return msgpack.ExtType(4, msgpack.packb((array.shape, array.ravel().tolist())))
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def packed_client(fields) -> bytes:
    return zlib.compress(msgpack.packb({name: packed_array(v) for name, v in fields.items()}))


def write_fedjax(path, clients, *, page_size=1024):
    """FedJAX's table. ``clients``: ``{client: {field: array}}``, or bytes in place of fields."""
    connection = sqlite3.connect(path)
    connection.executescript(
        f"""PRAGMA page_size={page_size};
        CREATE TABLE federated_data (client_id BLOB NOT NULL PRIMARY KEY, data BLOB NOT NULL,
                                     num_examples INTEGER NOT NULL);"""
    )
    for client, fields in clients.items():
        raw = isinstance(fields, bytes)
        data = fields if raw else packed_client(fields)
        size = 1 if raw else len(next(iter(fields.values())))
        connection.execute("INSERT INTO federated_data VALUES (?, ?, ?)", (client.encode(), data, size))
    connection.commit()
    connection.close()
    return path


def edit(path, *statements):
    """Run SQL on a file, to damage it in ways that bytes can't."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(*statement if isinstance(statement, tuple) else (statement,))
    connection.commit()
    connection.close()


def write_lzma(path, source, *, keep=False):
    """TFF's packing: the old ``.lzma`` container, which has no checksum."""
    path.write_bytes(lzma.compress(source.read_bytes(), format=lzma.FORMAT_ALONE))
    if not keep:
        source.unlink()
    return path


def strings(*values: str) -> np.ndarray:
    return np.array([v.encode() for v in values], dtype=object)


def emnist(seed=0, sizes=(2, 1, 3), digits=False) -> dict[str, dict[str, np.ndarray]]:
    """Writers with pixels in 0..1 and labels; the first label is always the last class."""
    rng, classes = np.random.default_rng(seed), 10 if digits else 62
    out = {}
    for k, n in enumerate(sizes):
        label = rng.integers(0, classes, n).astype(np.int32)
        label[:1] = classes - 1
        out[f"f{k:04d}_{k:02d}"] = {
            "label": label, "pixels": rng.random((n, 28, 28), np.float32).round(1)
        }  # fmt: skip
    return out


def emnist_folder(folder, source):
    """``(folder, train, test)``: one writer has no test examples, one has only test examples."""
    train, test = emnist(1), emnist(2, sizes=(2, 1, 3, 2))
    del test["f0001_01"]
    if source == "tff":
        digits = {f"digits_only_{s}": emnist(3, digits=True) for s in ("train", "test")}
        write_tff(folder / "emnist_all.sqlite", {"all_train": train, "all_test": test} | digits)
    else:
        write_fedjax(folder / "federated_emnist_train.sqlite", train)
        write_fedjax(folder / "federated_emnist_test.sqlite", test)
        for split in ("train", "test"):
            path = folder / f"federated_emnist_digitsonly_{split}.sqlite"
            write_fedjax(path, emnist(3, digits=True))
    return folder, train, test


def cifar(seed, sizes):
    rng = np.random.default_rng(seed)
    return {
        str(k): {
            "coarse_label": rng.integers(0, 20, n),
            "image": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
            "label": rng.integers(0, 100, n),
        }
        for k, n in enumerate(sizes)
    }

"""Data sets on disk: what is read is what was saved, and damage is named by file and field."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import stored
from tests.problems import softmax_data


def nested_data() -> fl.FederatedData:
    rows = lambda n: {
        "in": (np.arange(n * 2, dtype=np.float32).reshape(n, 2), [np.arange(n) % 2 == 0]),
        "y": np.arange(n),
        "half": np.arange(n).astype(jnp.bfloat16),  # a type that NumPy can't name
    }
    return fl.FederatedData.from_clients({"b": rows(3), "a": rows(0), 7: rows(2)}, attrs={"age": [1.0, 2.0, 3.0]})


def test_what_is_opened_is_what_was_saved(tmp_path):
    data = nested_data()
    there = fl.FederatedData.open(data.save(tmp_path / "set"))
    assert list(there.ids) == ["b", "a", 7]
    assert jax.tree.structure(there.arrays) == jax.tree.structure(data.arrays)
    for new, old in zip(jax.tree.leaves(there), jax.tree.leaves(data), strict=True):
        assert new.dtype == old.dtype and np.array_equal(np.asarray(new), np.asarray(old))
    assert (there.max_size, there.tile) == (data.max_size, data.tile)
    assert stored.mapped(there) and not stored.mapped(data)
    assert stored.fingerprint(there) == stored.fingerprint(data)


def test_rows_in_any_order_are_saved_client_after_client(tmp_path):
    data = softmax_data()
    turned = data.select([3, 0, 2])
    there = fl.FederatedData.open(turned.save(tmp_path / "set"), verify=True)
    assert np.array_equal(there.client("c3").arrays["x"], data.client("c3").arrays["x"])
    assert there.sizes.tolist() == [30, 5, 1]
    first = int(data.starts[3])
    apart = fl.FederatedData(data.arrays, data.starts[[3, 1]], data.sizes[[3, 1]], {}, turned.id_table, 30, 8)
    arrays = stored.open_folder(_resaved(apart, tmp_path)).arrays
    assert np.array_equal(arrays["x"][:30], data.arrays["x"][first : first + 30])
    assert np.array_equal(arrays["x"][30:], data.client("c1").arrays["x"])


def _resaved(data: fl.FederatedData, tmp_path: Path) -> Path:
    from fedjax_lab.data import Ids

    object.__setattr__(data, "id_table", Ids(range(data.num_clients)))
    return data.save(tmp_path / "again")


def test_ids_of_a_range_cost_no_list(tmp_path):
    arrays = {"x": np.ones((4, 1), np.float32)}
    folder = fl.FederatedData.from_assignment(arrays, np.array([0, 2, 2, 1]), 5).save(tmp_path / "set")
    assert json.loads((folder / "data.json").read_text())["header"]["ids"] == {"range": [0, 5, 1]}
    assert fl.FederatedData.open(folder).ids == range(5)


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        softmax_data().save(tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


FIRST, SECOND, HEADER = "field-00000.npy", "field-00001.npy", "data.json"
DAMAGES = {
    "cut": (lambda d: rewrite(d / FIRST, lambda b: b[:-4]), "field-00000.*'x'.*cut short"),
    "longer": (lambda d: rewrite(d / SECOND, lambda b: b + b"more"), "field-00001.*'y'.*has grown"),
    "missing": (lambda d: (d / SECOND).unlink(), "field-00001.*'y'.*is missing"),
    "altered": (lambda d: flip(d / FIRST, -1), "field-00000.*'x'.*was altered"),
    "sizes": (lambda d: flip(d / "sizes.npy", -1), "sizes.npy.*'sizes'.*was altered"),
    "attribute": (lambda d: flip(d / "attr-00000.npy", -1), "attr-00000.*'attrs/age'.*was altered"),
    "header": (lambda d: rewrite(d / HEADER, lambda b: b.replace(b'"c1"', b'"c9"')), "data.json was altered"),
    "torn": (lambda d: (d / HEADER).write_text("{"), "data.json can't be read"),
    "no object": (lambda d: (d / HEADER).write_text("[1]"), "data.json can't be read"),
    "format": (lambda d: rewrite(d / HEADER, lambda b: b.replace(b'"format": 1', b'"format": 9')), "format 9"),
    "none": (lambda d: (d / HEADER).unlink(), "holds no data set"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path, damage):
    data = softmax_data()
    clients = {i: data.client(i).arrays for i in data.ids}
    folder = fl.FederatedData.from_clients(clients, attrs={"age": np.arange(8.0)}).save(tmp_path / "set")
    harm, words = DAMAGES[damage]
    harm(folder)
    with pytest.raises(ValueError, match=words):
        fl.FederatedData.open(folder)


def test_large_files_are_read_through_only_when_asked(tmp_path, monkeypatch):
    folder = softmax_data().save(tmp_path / "set")
    monkeypatch.setattr(stored, "SMALL", 200)
    flip(folder / "field-00000.npy", -1)
    fl.FederatedData.open(folder)
    with pytest.raises(ValueError, match=r"field 'x'.*was altered"):
        fl.FederatedData.open(folder, verify=True)


def test_a_header_of_the_right_digest_with_a_wrong_shape_is_refused(tmp_path):
    folder = softmax_data().save(tmp_path / "set")
    header = json.loads((folder / "data.json").read_text())["header"]
    header["files"]["field-00000.npy"]["shape"] = [105, 2]
    (folder / "data.json").write_text(json.dumps({"sha256": stored._sha256(header), "header": header}))
    with pytest.raises(ValueError, match=r"field 'x'.*holds float32\[105, 4\]"):
        fl.FederatedData.open(folder)
    del header["structure"]
    (folder / "data.json").write_text(json.dumps({"sha256": stored._sha256(header), "header": header}))
    with pytest.raises(ValueError, match=r"data.json.*'structure'"):
        fl.FederatedData.open(folder)


def test_what_can_not_be_saved_is_refused(tmp_path):
    rows: Any = {"x": np.ones((1, 2), np.float32)}
    with pytest.raises(ValueError, match="only integers and strings"):
        fl.FederatedData.from_clients({(1, 2): rows}).save(tmp_path / "a")
    with pytest.raises(ValueError, match="Split: only dicts, lists and tuples"):
        fl.FederatedData.from_clients({0: fl.Split(rows, rows)}).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()

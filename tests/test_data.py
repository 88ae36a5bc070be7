"""FederatedData: what goes in comes out by client, and bad input is named."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import devices
from fedjax_lab.description import best_tile

RNG = np.random.default_rng(0)


def make(sizes=(3, 0, 5), **kwargs):
    clients = {f"c{k}": {"x": RNG.normal(size=(n, 2)), "y": np.arange(n)} for k, n in enumerate(sizes)}
    return clients, fl.FederatedData.from_clients(clients, **kwargs)


def test_clients_come_back_as_they_went_in():
    clients, data = make()
    assert (data.num_clients, data.num_examples, list(data.ids)) == (3, 8, ["c0", "c1", "c2"])
    for name, rows in clients.items():
        client = data.client(name)
        assert int(client.size) == len(rows["y"])
        batch, mask = client.full()
        np.testing.assert_array_equal(np.asarray(batch["x"])[np.asarray(mask)], rows["x"].astype(np.float32))


def test_flat_arrays_are_grouped_by_owner_and_keep_their_order():
    owners = np.array(["b", "a", "b", "c", "a"])
    data = fl.FederatedData.from_arrays({"x": np.arange(5)}, owners)
    assert list(data.ids) == ["a", "b", "c"]
    assert [data.client(i).full()[0]["x"].tolist() for i in data.ids] == [[1, 4], [0, 2], [3]]


def test_an_assignment_leaves_rows_out_and_makes_empty_clients():
    data = fl.FederatedData.from_assignment({"x": np.arange(5)}, np.array([2, -1, 0, 2, 0]), num_clients=4)
    assert data.sizes.tolist() == [2, 0, 2, 0]
    assert data.client(2).full()[0]["x"].tolist() == [0, 3]


@pytest.mark.parametrize("fractions", [0.8, 0.5, (0.6, 0.2, 0.2)])
def test_a_split_divides_every_client(fractions):
    _, data = make((10, 1, 0, 2, 7))
    parts = data.split(fractions, seed=3)
    assert all(p.ids is data.ids for p in parts)
    assert sum(p.sizes for p in parts).tolist() == data.sizes.tolist()
    for name in data.ids:
        rows = np.concatenate([p.client(name).arrays["x"] for p in parts])
        whole = data.client(name).arrays["x"]
        np.testing.assert_array_equal(rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)])
    assert parts[0].sizes[1] == 1  # a single example stays in the first part
    assert parts[0].sizes[3] >= 1
    assert parts[-1].sizes[3] >= 1
    if fractions == 0.8:
        assert parts[0].sizes[0] == 8
    again = data.split(fractions, seed=3)
    np.testing.assert_array_equal(parts[0].arrays["x"], again[0].arrays["x"])
    assert not np.array_equal(parts[0].arrays["x"], data.split(fractions, seed=4)[0].arrays["x"])


def test_seeds_of_splits_that_are_none():
    whole = fl.FederatedData.from_clients({k: {"x": np.zeros(4)} for k in range(3)})
    for split in (whole.split, whole.split_clients):
        with pytest.raises(ValueError, match="seed must be an integer of at least 0; got -1"):
            split(0.5, seed=-1)
        with pytest.raises(ValueError, match=r"seed must be an integer; got 0\.5"):
            split(0.5, seed=0.5)


def test_splitting_clients_separates_them():
    _, data = make(tuple(range(1, 11)))
    seen, unseen = data.split_clients(0.7, seed=1)
    assert (seen.num_clients, unseen.num_clients) == (7, 3)
    assert set(seen.ids) | set(unseen.ids) == set(data.ids)
    for part in (seen, unseen):
        for name in part.ids:
            np.testing.assert_array_equal(part.client(name).arrays["x"], data.client(name).arrays["x"])


def test_describe_counts():
    data = fl.FederatedData.from_clients({0: {"y": np.array([0, 0, 1])}, 1: {"y": np.array([2])}})
    found = data.describe()
    assert (found["clients"], found["examples"], found["labels"], found["labels_per_client"]) == (2, 4, 3, 1.5)
    assert "labels per client" in str(found)


def test_one_large_client_does_not_set_the_tile():
    assert best_tile(np.array([10] * 1000 + [50_000])) <= 32
    assert best_tile(np.array([600] * 100)) == 600


def bad(**fields):
    return {"ok": {"x": np.zeros((2, 2))}, "sick": fields}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, bool])
@pytest.mark.parametrize("rows", [0, 5, 2_000_000])
def test_data_on_a_device_are_a_copy_in_jaxs_types(dtype, rows):
    x = (np.arange(rows) % 7).astype(dtype)
    there = devices.put(x)
    expected = x.astype(jax.dtypes.canonicalize_dtype(dtype))
    assert there.dtype == expected.dtype
    x[:] = 0
    np.testing.assert_array_equal(there, expected)
    assert devices.put(there) is there


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: fl.FederatedData.from_clients({}), ["at least one client"]),
        (lambda: fl.FederatedData.from_clients({"a": {"x": np.zeros((0, 2))}}), ["none of the 1 clients"]),
        (
            lambda: fl.FederatedData.from_clients({"a": {"x": np.zeros((2, 2)), "y": np.zeros(3)}}),
            ["'a'", "y", "3", "2"],
        ),
        (lambda: fl.FederatedData.from_clients(bad(x=np.zeros((2, 3)))), ["'sick'", "x", "(3,)"]),
        (lambda: fl.FederatedData.from_clients(bad(z=np.zeros((2, 2)))), ["'sick'", "'z'"]),
        (
            lambda: fl.FederatedData.from_clients(bad(x=np.array([[0, 0], [0, np.nan]]))),
            ["'sick'", "x", "row 1", "NaN"],
        ),
        (lambda: fl.FederatedData.from_clients(bad(x=np.array([[np.inf, 0]]))), ["'sick'", "row 0"]),
        (lambda: fl.FederatedData.from_clients({"a": {"x": np.full(2, np.nan, jnp.bfloat16)}}), ["'a'", "NaN"]),
        (lambda: fl.FederatedData.from_clients({"a": {"x": np.zeros(2, "m8[s]")}}), ["numeric"]),
        (lambda: fl.FederatedData.from_clients(bad(x=np.float32(1))), ["'sick'", "x", "scalar"]),
        (lambda: fl.FederatedData.from_clients([("a", {"x": np.zeros(1)})] * 2), ["'a'", "more than once"]),
        (lambda: fl.FederatedData.from_clients({"a": {"x": np.array(["text"])}}), ["numeric"]),
        (lambda: fl.FederatedData.from_arrays({"x": np.zeros(3)}, np.zeros(2)), ["x", "3", "2"]),
        (lambda: fl.FederatedData.from_arrays({"x": np.zeros(0)}, np.zeros(0)), ["at least one row"]),
        (lambda: make(attrs={"speed": np.zeros(2)}), ["'speed'", "3"]),
        (lambda: make()[1].split(1.5), ["1.5"]),
        (lambda: make()[1].split((0.5, 0.6)), ["0.6"]),
        (lambda: make((4,))[1].split_clients(0.5), ["two clients"]),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        build()
    for word in words[1:]:
        assert word in str(caught.value)


def test_an_unknown_client_is_named_with_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'c1'"):
        make()[1].client("c1x")

"""Partitioners: their laws, checked against closed forms, and what they refuse."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedjax_lab.datasets import allocating
from fedjax_lab.datasets.pachinko_allocation import pachinko
from fedjax_lab.datasets.partition import (
    by_attribute,
    dirichlet,
    dirichlet_sizes,
    iid,
    match,
    power_law,
    shards,
)

LABELS = np.random.default_rng(7).permutation(np.repeat(np.arange(10), 60))
COLUMNS = {"y": LABELS, "group": LABELS // 5, "x": np.zeros((600, 3), np.float32)}

ALL = {
    "iid": iid(7),
    "dirichlet": dirichlet(20, 0.1),
    "dirichlet, equal sizes": dirichlet(20, 0.1, equal_sizes=True),
    "dirichlet_sizes": dirichlet_sizes(20, 0.3),
    "shards": shards(20, 2),
    "power_law": power_law(30, min_per_label=2),
    "by_attribute": by_attribute("y"),
    "pachinko": pachinko(20, coarse="group"),
}


def _counts(owners, labels=LABELS):
    table = np.zeros((owners.max() + 1, labels.max() + 1), int)
    np.add.at(table, (owners[owners >= 0], labels[owners >= 0]), 1)
    return table


@pytest.mark.parametrize("name", ALL)
def test_every_row_has_one_owner_and_every_client_a_row(name):
    owners = ALL[name](COLUMNS, 3)
    assert owners.shape == (600,) and owners.dtype == np.int64 and owners.min() == 0
    assert (np.bincount(owners) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_a_partition_is_a_function_of_its_seed(name):
    partition = ALL[name]
    np.testing.assert_array_equal(partition(COLUMNS, 3), partition(COLUMNS, 3))
    if name != "by_attribute":
        assert (partition(COLUMNS, 3) != partition(COLUMNS, 4)).any()


def test_iid_sizes_differ_by_one_at_most():
    sizes = np.bincount(iid(7)(COLUMNS, 0))
    assert sorted(set(sizes)) == [85, 86] and sizes.sum() == 600


def test_dirichlet_with_large_alpha_divides_each_label_evenly():
    assert (_counts(dirichlet(20, 1e9)(COLUMNS, 0)) == 3).all()
    table = _counts(dirichlet(20, 1e9, equal_sizes=True)(COLUMNS, 0))
    assert (table.sum(1) == 30).all() and table.max() < 12  # 30 multinomial draws over 10 labels


def test_dirichlet_shares_of_the_first_label_have_the_moments_of_the_law():
    # Dir(alpha) over K clients: mean 1/K, variance (1/K)(1 - 1/K) / (K alpha + 1). Later labels are
    # subject to NIID-Bench's cap. Two-sided: half and double alpha would miss the band.
    clients, alpha, draws = 4, 0.5, 1500
    partition = dirichlet(clients, alpha, min_size=1)
    shares = np.stack([_counts(partition(COLUMNS, s))[:, 0] / 60 for s in range(draws)])
    variance = 0.25 * 0.75 / (clients * alpha + 1)
    assert abs(shares.mean(0) - 0.25).max() < 4 * np.sqrt(variance / draws)
    squares = (shares - 0.25) ** 2
    assert abs(squares.mean() - variance) < 4 * squares.std() / np.sqrt(draws)
    assert abs(squares.mean() - 0.25 * 0.75 / (2 * clients * alpha + 1)) > 0.01


def test_dirichlet_gives_no_more_to_a_client_that_has_its_share():
    for seed in range(30):
        table = _counts(dirichlet(8, 0.2, min_size=1)(COLUMNS, seed))
        before = np.cumsum(table, 1) - table
        assert (table[before >= 600 / 8] == 0).all()


def test_equal_sized_dirichlet_has_the_moments_of_hsu():
    # Client 0 draws m rows from shares ~ Dir(alpha p), p = 1/10: the variance of its share of a
    # label is p(1-p)(1/(alpha+1) + (1 - 1/(alpha+1))/m).
    alpha, m, p = 2.0, 30, 0.1
    labels = np.repeat(np.arange(10), 300)
    partition = dirichlet(100, alpha, equal_sizes=True, min_size=1)
    first = [labels[partition({"y": labels}, seed) == 0] for seed in range(300)]
    shares = np.stack([np.bincount(y, minlength=10) / m for y in first])
    variance = p * (1 - p) * (1 / (alpha + 1) + (1 - 1 / (alpha + 1)) / m)
    squares = (shares - p) ** 2
    assert abs(squares.mean() - variance) < 5 * squares.std() / np.sqrt(squares.size)
    assert abs(squares.mean() - p * (1 - p) / (10 * alpha + 1)) > 0.01  # Dir(alpha) per label


@pytest.mark.parametrize("equal", [False, True])
def test_dirichlet_keeps_min_size_where_redrawing_is_hopeless(equal):
    partition = dirichlet(100, 0.01, min_size=6, equal_sizes=equal)  # 600 rows: all must have 6
    assert (np.bincount(partition(COLUMNS, 0)) == 6).all()


def test_dirichlet_sizes_have_the_variance_of_the_law():
    clients, alpha, seeds = 5, 2.0, 1000
    partition = dirichlet_sizes(clients, alpha, min_size=1)
    sizes = np.stack([np.bincount(partition(COLUMNS, s)) for s in range(seeds)])
    assert (sizes.sum(1) == 600).all() and sizes.min() >= 1
    shares = (sizes - 1) / 595
    squares = (shares - 1 / clients) ** 2
    variance = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert abs(squares.mean() - variance) < 5 * squares.std() / np.sqrt(squares.size)


def test_shards_are_equal_and_of_one_label_where_the_numbers_divide():
    table = _counts(shards(10, 2)(COLUMNS, 0))
    assert (table.sum(1) == 60).all()
    assert set(np.unique(table)) <= {0, 30, 60} and ((table > 0).sum(1) <= 2).all()
    sizes = np.bincount(shards(7, 2)({"y": LABELS[:599]}, 0))
    assert sizes.sum() == 599 and sizes.max() - sizes.min() <= 2


def test_power_law_holds_the_labels_and_sizes_of_fedprox():
    labels, clients = np.repeat(np.arange(10), 7000), np.arange(1000)
    held = (clients[:, None] + np.arange(2)) % 10
    ours, theirs = [], []
    for seed in range(20):
        table = _counts(power_law()({"y": labels}, seed), labels)
        assert table.sum() == 70_000 and table.sum(1).min() >= 10
        assert (np.take_along_axis(table, held, 1) >= 5).all()
        assert np.take_along_axis(table, held, 1).sum() == 70_000
        ours.append(table.sum(1).std())
        # The arithmetic of FedProx's script: 10 rows each, then lognormal shares rounded down.
        # (Its paper's table 1 has a standard deviation of 106: one draw, at the low end of this law.)
        shares = np.random.default_rng(seed).lognormal(0, 2, (10, 100, 2))
        extra = (6000 * shares / shares.sum((1, 2), keepdims=True)).astype(int)
        sizes = 10 + extra[held, clients[:, None] // 10, np.arange(2)].sum(1)
        theirs.append(sizes.std())
    # Standard error of the difference of medians: about 10.
    assert abs(np.median(ours) - np.median(theirs)) < 40


def test_power_law_leaves_out_labels_that_nobody_holds():
    owners = power_law(3, min_per_label=1)(COLUMNS, 0)
    assert set(LABELS[owners == -1]) == {4, 5, 6, 7, 8, 9}
    assert [sorted(set(LABELS[owners == k])) for k in range(3)] == [[0, 1], [1, 2], [2, 3]]


def test_by_attribute_numbers_values_in_order():
    cities = np.array(["york", "bath", "york", "hull"])
    np.testing.assert_array_equal(by_attribute("city")({"city": cities}, 0), [2, 0, 2, 1])


def test_pachinko_as_in_federated_cifar100():
    fine = np.repeat(np.arange(100), 500)
    columns = {"y": fine, "coarse_label": fine // 5}
    owners = pachinko(500, 0.1, 10.0, size=100)(columns, 0)
    table = _counts(owners, fine)
    assert (table.sum(1) == 100).all() and (table.sum(0) == 500).all()
    by_mapping = pachinko(500, size=100, coarse={f: f // 5 for f in range(100)})(columns, 0)
    np.testing.assert_array_equal(owners, by_mapping)
    coarse = table.reshape(500, 20, 5).sum(2)
    assert 2 < (coarse[:100] > 0).sum(1).mean() < 8  # Dir(0.1) over 20: few coarse labels matter


def test_pachinko_of_extreme_concentrations():
    columns = {"y": LABELS, "coarse_label": LABELS // 5}
    # alpha -> 0: all of one coarse label, beta -> infinity: evenly over its fine labels.
    table = _counts(pachinko(6, 1e-6, 1e9, size=50)(columns, 1))[0].reshape(2, 5)
    assert sorted(table.sum(1)) == [0, 50] and table[table.sum(1) > 0].min() >= 3
    # beta -> 0 as well: one fine label.
    table = _counts(pachinko(6, 1e-6, 1e-6, size=50)(columns, 1))[0]
    assert sorted(table)[-2:] == [0, 50]


def test_match_sends_test_labels_where_training_has_them():
    train = {"y": np.array([0, 0, 0, 1, 1, 2])}
    owners = np.array([0, 0, 1, 1, 1, -1])
    test = {"y": np.repeat([0, 1, 2], [6000, 50, 6000])}
    out = match(train, owners)(test, 0)
    assert (out[6000:6050] == 1).all()
    # Label 0: 2 of 3 at client 0. Label 2, which nobody trains on: by size, 2 of 5.
    for rows, share in ((out[:6000], 2 / 3), (out[6050:], 2 / 5)):
        assert abs((rows == 0).mean() - share) < 4 * np.sqrt(share * (1 - share) / 6000)


def test_match_of_real_valued_labels_follows_the_sizes():
    owners = np.repeat([0, 1], [300, 100])
    out = match({"y": np.zeros(400)}, owners)({"y": np.zeros(4000)}, 0)
    assert abs((out == 0).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)


def test_drawing_without_replacement_is_drawing_one_by_one():
    weights, left, size = np.array([0.7, 0.2, 0.1]), np.array([1, 2, 4]), 4
    exact = {}
    for draws in itertools.product(range(3), repeat=size):
        chance, rest = 1.0, left.copy()
        for kind in draws:
            open_weights = weights * (rest > 0)
            chance *= open_weights[kind] / open_weights.sum()
            rest[kind] -= 1
            if chance == 0:
                break
        counts = tuple(np.bincount(draws, minlength=3))
        exact[counts] = exact.get(counts, 0) + chance
    rng, seen, n = np.random.default_rng(0), {}, 4000
    for _ in range(n):
        counts = tuple(allocating.draw_without_replacement(rng, size, weights, left))
        seen[counts] = seen.get(counts, 0) + 1
    assert abs(sum(exact.values()) - 1) < 1e-12
    for counts, chance in exact.items():
        assert abs(seen.get(counts, 0) / n - chance) <= 4 * np.sqrt(chance * (1 - chance) / n)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.floats(0, 1e6), min_size=1, max_size=30))
def test_apportion_is_within_one_of_the_exact_share(total, weights):
    counts = allocating.apportion(total, np.array(weights))
    assert counts.sum() == total and counts.min() >= 0
    if sum(weights) > 0:
        assert abs(counts - total * np.array(weights) / sum(weights)).max() < 1 + 1e-6


def test_apportion_by_hand():
    np.testing.assert_array_equal(allocating.apportion(10, np.array([1, 1, 1])), [4, 3, 3])
    np.testing.assert_array_equal(allocating.apportion(7, np.array([0.5, 0.3, 0.2])), [4, 2, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dirichlet(10, 0.0), "alpha must be positive"),
        (lambda: dirichlet(10, -1), "alpha must be positive"),
        (lambda: dirichlet(10, float("nan")), "alpha must be positive"),
        (lambda: dirichlet_sizes(10, 0), "alpha must be positive"),
        (lambda: pachinko(10, 0.1, 0), "beta must be positive"),
        (lambda: iid(0), "num_clients must be positive"),
        (lambda: iid(2.5), "num_clients must be a positive integer"),
        (lambda: shards(5, 0), "shards_per_client must be positive"),
        (lambda: power_law(10, sigma=0), "sigma must be positive"),
        (lambda: iid(601)(COLUMNS, 0), "600 rows can't be divided among 601 clients"),
        (lambda: dirichlet(301, 1.0)(COLUMNS, 0), "among 301 clients with 2 rows each"),
        (lambda: shards(301)(COLUMNS, 0), "with 2 rows each"),
        (lambda: dirichlet(5, 1.0, field="lable")({"label": LABELS}, 0), "did you mean 'label'"),
        (lambda: shards(5)({"x": LABELS}, 0), "no field 'y' among"),
        (lambda: by_attribute("user")(COLUMNS, 0), "no field 'user'"),
        (lambda: by_attribute("x")(COLUMNS, 0), "one value a row"),
        (lambda: dirichlet(5, 1.0)({"y": LABELS / 2}, 0), "one integer label a row"),
        (lambda: iid(5)({"y": LABELS, "x": np.zeros(3)}, 0), "'x' has 3 rows but 'y' has 600"),
        (lambda: iid(5)({}, 0), "no columns"),
        (lambda: power_law(100, min_per_label=5)(COLUMNS, 0), "need 5 rows of label 0"),
        (lambda: power_law(20, labels_per_client=11)(COLUMNS, 0), "only 10 labels"),
        (lambda: pachinko(5, coarse={0: 1})(COLUMNS, 0), "no coarse label for the labels"),
        (
            lambda: pachinko(5, coarse="g")({"y": LABELS, "g": np.arange(600) % 2}, 0),
            "more than one coarse label",
        ),
        (lambda: match(COLUMNS, np.full(600, -1)), "no row to any client"),
    ],
)
def test_bad_hyper_parameters_and_columns_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

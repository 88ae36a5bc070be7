"""The picture of a partition shows the partition."""

import numpy as np
import pytest

import fedjax_lab as fl

pytest.importorskip("matplotlib")
LABELS = np.repeat(np.arange(5), 40)


def _data(owners):
    return fl.FederatedData.from_assignment({"x": np.zeros((200, 1)), "y": LABELS}, owners)


def test_counts_agree_with_the_assignment():
    owners = fl.datasets.dirichlet(8, 0.5)({"y": LABELS}, 0)
    owners[::10] = -1
    names, counts = fl.datasets.label_counts(owners, LABELS)
    by_hand = [[sum(o == k for o in owners[c == LABELS]) for c in range(5)] for k in range(8)]
    np.testing.assert_array_equal(counts, by_hand)
    np.testing.assert_array_equal(names, np.arange(5))
    np.testing.assert_array_equal(fl.datasets.label_counts(_data(owners))[1], by_hand)


def test_counts_of_selected_clients():
    data = _data(LABELS).select([3, 1])
    np.testing.assert_array_equal(fl.datasets.label_counts(data)[1], [[0, 40], [40, 0]])


def test_bars_are_as_high_as_clients_are_large(tmp_path):
    owners = np.arange(200) % 7 % 3
    figure = fl.datasets.plot_partition(owners, LABELS, kind="bars", title="who has what")
    left, right = figure.axes
    tops = {}
    for bar in left.patches:
        middle = round(bar.get_x() + bar.get_width() / 2)
        tops[middle] = max(tops.get(middle, 0), bar.get_y() + bar.get_height())
    np.testing.assert_allclose([tops[k] for k in range(3)], np.bincount(owners))
    assert sum(bar.get_height() for bar in right.patches) == 3
    figure.savefig(tmp_path / "partition.png")
    assert (tmp_path / "partition.png").stat().st_size > 5000


def test_bubbles_have_areas_in_proportion():
    figure = fl.datasets.plot_partition(_data(np.minimum(LABELS, 1)))  # 40 of label 0; 40 of each other
    points = figure.axes[0].collections[0]
    np.testing.assert_array_equal(points.get_offsets(), [[0, 0], [1, 1], [1, 2], [1, 3], [1, 4]])
    assert len(set(points.get_sizes())) == 1


def test_many_clients_are_thinned_in_the_bars_only():
    labels = np.tile(np.arange(10), 200)
    figure = fl.datasets.plot_partition(np.arange(2000) // 4, labels)
    assert "100 of 500" in figure.axes[0].get_xlabel()
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 500


def test_what_cannot_be_drawn_is_refused():
    owners = LABELS % 2
    with pytest.raises(ValueError, match="give labels="):
        fl.datasets.plot_partition(owners)
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), but there are 200 rows"):
        fl.datasets.plot_partition(owners, np.zeros(3))
    with pytest.raises(ValueError, match="kind must be 'bubbles' or 'bars'"):
        fl.datasets.plot_partition(owners, LABELS, kind="pie")
    real = fl.FederatedData.from_assignment({"x": np.zeros(200), "y": LABELS / 2}, owners)
    with pytest.raises(ValueError, match="no integer labels"):
        fl.datasets.plot_partition(real)

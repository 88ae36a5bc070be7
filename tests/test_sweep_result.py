"""What a sweep came to: means, bands and the best point by hand, single cells, pictures."""

import numpy as np
import pytest

import fedjax_lab as fl
from tests.promises.resuming import walk
from tests.refusals import raises

# ---- statistics, by hand ----


def by_hand(accuracy, **grids) -> fl.SweepResult:
    """A sweep whose metric was ``accuracy: [*grids, seeds, points]``."""
    accuracy = np.asarray(accuracy, np.float32)
    rounds, size = accuracy.shape[-1], accuracy.shape
    seeds = tuple(range(size[-2]))
    metrics = {"accuracy": accuracy, "uplink_bytes": np.full(size, 2_000_000), "downlink_bytes": np.full(size, 1)}
    points = {name: np.arange(1, rounds + 1) for name in metrics}
    return fl.SweepResult((), (), metrics, points, {n: tuple(v) for n, v in grids.items()}, seeds, rounds, 1.0, 1.0)


def test_means_and_bands():
    result = by_hand([[[1.0, 5], [2, 5], [3, 5]], [[0, 1], [0, 2], [3, 6]]], mu=[0, 1])
    np.testing.assert_allclose(result.mean("accuracy"), [[2, 5], [1, 3]])
    low, high = result.band("accuracy")
    t = 4.302653  # Student's t, two degrees of freedom, 97.5%
    half = t / np.sqrt(3) * np.array([[1, 0], [np.sqrt(3), np.sqrt(7)]])
    np.testing.assert_allclose(high - low, 2 * half, rtol=1e-6)
    np.testing.assert_allclose((high + low) / 2, result.mean("accuracy"))
    low, high = result.band("accuracy", level=0.5)
    np.testing.assert_allclose(high[0, 0] - low[0, 0], 2 * 0.8164966 / np.sqrt(3), rtol=1e-6)
    raises(lambda: by_hand([[1, 2]]).band("accuracy"), "at least two seeds")
    raises(lambda: result.band("accuracy", level=95), "level must lie between 0 and 1")


def test_the_best_point():
    nan = np.nan
    result = by_hand([[[1.0, 5], [3, 5]], [[9, 1], [9, 1]], [[9, nan], [9, 9]]], mu=[0, 0.5, 2])
    best = result.best("accuracy")
    assert (best.values, best.mean, best.low, best.high) == ({"mu": 0}, 5, 5, 5)
    assert result.best("accuracy", by="best").values == {"mu": 0.5}
    assert result.best("accuracy", by="mean").values == {"mu": 0.5}
    assert result.best("accuracy", below=True).values == {"mu": 0.5}
    assert by_hand([[4.0, 2]]).best("accuracy") == ({}, 2, None, None)
    raises(lambda: by_hand([[nan]]).best("accuracy"), "not finite at any point")
    raises(lambda: result.best("accuracy", by="lats"), "did you mean 'last'")
    raises(lambda: result.best("acuracy"), "no metric 'acuracy'", "did you mean 'accuracy'")


def test_one_cell_or_the_seeds_of_one_point():
    result = fl.sweep(walk, 2, [3, 8], rate=[0.1, 1])
    assert result.cell(rate=np.float32(0.1), seed=8).metrics == result.runs(rate=0.1)[1].metrics
    assert len(result.runs(rate=1)) == 2
    raises(lambda: result.cell(rate=0.1), "which seed? The sweep has [3, 8]")
    raises(lambda: result.cell(seed=3), "which rate? The sweep has [0.1, 1.0]")
    raises(lambda: result.cell(rate=0.1, seed=4), "the sweep has no seed=4; it has [3, 8]")
    raises(lambda: result.cell(rate=0.2, seed=3), "the sweep has no rate=0.2")
    raises(lambda: result.cell(rtae=0.1, seed=3), "no grid 'rtae'", "did you mean 'rate'")
    assert "rate=[0.1, 1.0], 2 seeds: 4 runs of 2 rounds" in repr(result)


# ---- pictures ----


def test_curves_with_bands():
    pytest.importorskip("matplotlib")
    accuracy = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 100
    result = by_hand(accuracy, learning_rate=[0.1, 0.01], mu=[0, 1, 10])
    figure = result.plot("accuracy")
    assert [ax.get_title() for ax in figure.axes] == ["mu 0", "mu 1", "mu 10"]
    ax = figure.axes[1]
    assert (ax.get_xlabel(), ax.get_ylabel(), len(ax.lines), len(ax.collections)) == ("round", "accuracy", 2, 2)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), result.mean("accuracy")[1, 1])
    _, high = result.band("accuracy", 0.9)
    band = result.plot("accuracy", level=0.9).axes[1].collections[1].get_paths()[0].vertices
    np.testing.assert_allclose(band[:, 1].max(), high[1, 1].max(), rtol=1e-6)
    legend = figure.axes[0].get_legend()
    assert legend.get_title().get_text() == "learning rate\nmean of 4 seeds, 95% band"
    assert [text.get_text() for text in legend.get_texts()] == ["0.1", "0.01"]
    (ax,) = result.plot("accuracy", "uplink_bytes", mu=1).axes
    assert ax.get_xlabel() == "uplink so far (MB)"
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [2, 4, 6, 8, 10])


def test_the_last_value_over_a_hyper_parameter():
    pytest.importorskip("matplotlib")
    accuracy = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 100
    result = by_hand(accuracy, learning_rate=[0.1, 0.01], mu=[0.1, 10, 1])
    (ax,) = result.plot("accuracy", x="mu").axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("mu", "accuracy after 5 rounds", "log")
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.1, 1, 10])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), result.mean("accuracy")[0, [0, 2, 1], -1])
    (ax,) = by_hand(accuracy[0, 0]).plot("accuracy").axes  # seeds alone
    assert ax.get_title() == "mean of 4 seeds, 95% band"
    (ax,) = by_hand(accuracy[0, :, :1], mu=[0, 1, 2]).plot("accuracy").axes  # one seed: no band to tell
    assert ax.get_legend().get_title().get_text() == "mu"


def test_a_diverging_run_does_not_flatten_the_others():
    pytest.importorskip("matplotlib")
    loss = np.array([[[2.0, 1, 0.5], [2, 1.1, 0.6]], [[2, 1e6, 1e12], [2, 1e7, np.nan]]])
    result = by_hand(loss, learning_rate=[0.1, 10])
    result = result._replace(metrics={"loss": loss}, points={"loss": np.arange(1, 4)})
    assert result.plot("loss").axes[0].get_ylim()[1] < 10
    assert result.plot("loss", x="learning_rate").axes[0].get_ylim()[1] < 10


def test_pictures_that_can_not_be_drawn():
    pytest.importorskip("matplotlib")
    result = by_hand(np.zeros((20, 2, 3)), mu=np.arange(20.0))
    raises(lambda: result.plot("accuracy"), "20 lines can't be told apart", "mu=...", "x='mu'")
    raises(lambda: result.plot("accuracy", x="rounds"), "x must be one of", "did you mean 'round'")
    raises(lambda: result.plot("accuracy", m=1), "no grid 'm'")
    raises(lambda: result.plot("accuracy", mu=0.5), "the sweep has no mu=0.5")
    raises(lambda: result.plot("accuracy", x="mu", mu=1.0), "mu can't be the x axis")
    assert len(result.plot("accuracy", mu=3).axes) == 1

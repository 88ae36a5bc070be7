"""Plots: the right numbers on the right axes, and no pyplot."""

import sys

import numpy as np
import pytest

import fedjax_lab as fl
from fedjax_lab import plots
from tests.promises.resuming import walk

pytest.importorskip("matplotlib")


def records(*values, name="accuracy", up=1_500_000):
    return [{"round": i + 1, name: v, "uplink_bytes": up, "downlink_bytes": 1} for i, v in enumerate(values)]


def test_a_results_curves():
    result = fl.run(walk(), 6, every=2, evaluate=lambda p, s: {"w_first": s.w[0]})
    figure = result.plot("w_first", "loss")
    first, second = figure.axes
    assert (first.get_xlabel(), first.get_ylabel(), second.get_ylabel()) == ("round", "w first", "loss")
    np.testing.assert_array_equal(first.lines[0].get_xdata(), [0, 2, 4, 6])
    np.testing.assert_array_equal(second.lines[0].get_ydata(), [m["loss"] for m in result.metrics[1:]])
    assert [ax.get_ylabel() for ax in result.plot().axes] == ["loss", "w first"]
    assert result.plot()._repr_png_().startswith(b"\x89PNG")


def test_bytes_so_far():
    both = [{"round": 1, "loss": 2.0, "uplink_bytes": 4_000_000, "probe_uplink_bytes": 1_000_000}]
    both += [{"round": 2, "uplink_bytes": 5_000_000}, {"round": 3, "loss": 1.0, "uplink_bytes": 5_000_000}]
    ax = plots.plot_metrics(both, "loss", x="uplink_bytes").axes[0]
    assert ax.get_xlabel() == "uplink so far (MB)"
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [5, 15])
    x, _, _ = plots.curve([records(1, 2)], "accuracy", "bytes")
    assert x.tolist() == [1_500_001, 3_000_002]


def test_bands_over_seeds_by_hand():
    seeds = [records(0.2, 0.5, 0.9), records(0.4, 0.7), records(0.6, 0.6)]
    x, mean, spread = plots.curve(seeds, "accuracy")
    assert x.tolist() == [1, 2]  # the third round is missing in two of them
    np.testing.assert_allclose(mean, [0.4, 0.6])
    np.testing.assert_allclose(spread, [np.sqrt(0.08 / 3), np.sqrt(0.02 / 3)])
    figure = plots.plot_runs({"ours": seeds, "theirs": seeds[:1]}, "accuracy", target=0.8)
    ax = figure.axes[0]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["ours (3 seeds, ± s.d.)", "theirs"]
    assert len(ax.collections) == 1  # one band
    assert ax.lines[-1].get_ydata() == [0.8, 0.8]
    ax = plots.plot_runs({"ours": seeds[:2], "theirs": seeds[1:]}, "accuracy").axes[0]
    assert ax.get_legend().get_title().get_text() == "mean ± s.d. over 2 seeds"


def test_curves_are_distinct():
    looks = [tuple(plots.look(i).values()) for i in range(28)]
    assert len(set(looks)) == 28


def test_refusals():
    with pytest.raises(ValueError, match="no record has the metric 'acuracy'; did you mean 'accuracy'"):
        plots.plot_metrics(records(1, 2), "acuracy")
    with pytest.raises(ValueError, match=r"x must be one of .*did you mean 'uplink_bytes'"):
        plots.plot_metrics(records(1, 2), "accuracy", x="uplink_byte")
    with pytest.raises(ValueError, match="no round that all 2 seeds recorded"):
        plots.curve([records(1), [{"round": 2, "accuracy": 1.0}]], "accuracy")
    with pytest.raises(ValueError, match="without records"):
        plots.plot_runs({"a": []}, "accuracy")
    with pytest.raises(ValueError, match="at least one run"):
        plots.plot_runs({}, "accuracy")
    with pytest.raises(ValueError, match="there is no metric to draw"):
        plots.plot_metrics([{"round": 1, "survivors": 3}])


def test_no_pyplot():
    plots.plot_metrics(records(1, 2), "accuracy")
    assert "matplotlib.pyplot" not in sys.modules

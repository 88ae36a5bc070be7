"""Who has what: a picture of a partition."""

from typing import Any

import numpy as np

from fedjax_lab import checks, plots
from fedjax_lab.data import FederatedData

_MOST_BARS = 100
_MOST_BUBBLES = 30


def plot_partition(
    data: FederatedData | np.ndarray,
    labels: np.ndarray | None = None,
    *,
    kind: str | None = None,
    title: str = "",
) -> Any:
    """Labels of each client, and a histogram of the clients' sizes.

    Args:
      data: a FederatedData with integer labels under ``"y"``, or an assignment ``int[rows]`` as the
        partitioners give it.
      labels: ``int[rows]``, for an assignment; optional for data, where they replace ``"y"``.
      kind: ``"bubbles"`` (a disc for each client and label, its area the number of rows) or
        ``"bars"`` (a stacked bar for each client); by default bubbles for up to 30 clients. Of
        more than 100 clients, 100 are drawn, taken at random; the histogram counts all of them.
      title: above the picture.

    Returns:
      A ``matplotlib.figure.Figure``; ``figure.savefig("partition.png")`` works without a display.
    """
    figures = checks.optional("matplotlib.figure", "plotting a partition", "plots")
    names, counts = label_counts(data, labels)
    kind = kind or ("bubbles" if len(counts) <= _MOST_BUBBLES else "bars")
    draw = {"bubbles": _bubbles, "bars": _bars}.get(kind)
    if draw is None:
        raise ValueError(f"kind must be 'bubbles' or 'bars'; got {kind!r}")
    figure = figures.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.4, 1])
    shown = np.arange(len(counts))
    if len(shown) > _MOST_BARS:
        # At random: evenly spaced ones would all have the same labels where labels go in turns.
        shown = np.sort(np.random.default_rng(0).permutation(len(counts))[:_MOST_BARS])
    draw(left, shown, counts[shown], names)
    left.set_xlabel("client" if len(shown) == len(counts) else f"client (100 of {len(counts)})")
    sizes = counts.sum(1)
    right.hist(sizes, bins=min(30, max(5, len(np.unique(sizes)))), color="0.45")
    right.set_xlabel("rows of a client")
    right.set_ylabel("clients")
    right.yaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title or f"{len(counts)} clients, {sizes.sum()} rows, {len(names)} labels", fontsize=11)
    return plots.shows_itself(figure)


def label_counts(data: FederatedData | np.ndarray, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The labels ``[labels]`` and how often each client has each: ``int64[clients, labels]``."""
    if isinstance(data, FederatedData):
        sizes = np.asarray(data.sizes)
        owners, clients = np.repeat(np.arange(len(sizes)), sizes), len(sizes)
        if labels is None:
            labels = checks.label_leaf(data.arrays)
            if labels is None:
                raise ValueError("the data have no integer labels [rows] under 'y'; give labels=")
            labels = np.asarray(labels)[data.rows_of()]
    else:
        owners = np.asarray(data)
        clients = int(owners.max(initial=-1)) + 1
        if labels is None:
            raise ValueError("an assignment alone does not say who has which label; give labels=")
    labels = np.asarray(labels)
    if labels.shape != owners.shape:
        raise ValueError(f"labels have shape {labels.shape}, but there are {len(owners)} rows")
    labels, owners = labels[owners >= 0], owners[owners >= 0]
    names, codes = np.unique(labels, return_inverse=True)
    flat = np.bincount(owners * len(names) + codes, minlength=clients * len(names))
    return names, flat.reshape(clients, len(names))


def _bars(axes: Any, clients: np.ndarray, counts: np.ndarray, names: np.ndarray) -> None:
    bottom = np.zeros(len(clients))
    for j, name in enumerate(names):
        color = _color(j, len(names))
        axes.bar(np.arange(len(clients)), counts[:, j], 1.0, bottom, color=color, label=str(name))
        bottom += counts[:, j]
    ticks = np.unique(np.linspace(0, len(clients) - 1, min(11, len(clients))).astype(int))
    axes.set_xticks(ticks, [str(c) for c in clients[ticks]])
    axes.set_ylabel("rows")
    axes.margins(x=0)
    if len(names) <= 20:
        axes.legend(title="label", fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _bubbles(axes: Any, clients: np.ndarray, counts: np.ndarray, names: np.ndarray) -> None:
    k, j = np.nonzero(counts)
    area = 260.0 * counts[k, j] / counts.max()
    colors = [_color(int(label), len(names)) for label in j]
    axes.scatter(k, j, s=area, c=colors)
    axes.set_xticks(np.arange(len(clients)), [str(c) for c in clients], fontsize=7)
    if len(names) <= 40:
        axes.set_yticks(np.arange(len(names)), [str(n) for n in names], fontsize=8)
    axes.set_ylabel("label")
    axes.margins(x=0.05, y=0.08)


def _color(index: int, of: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab20" if of > 10 else "tab10"](index % 20)

"""What a FederatedData holds, in numbers."""

from typing import Any

import numpy as np

from fedjax_lab import checks


def best_tile(sizes: np.ndarray, overhead: int = 16) -> int:
    """How many rows to read at once when a whole client is read: few padded rows, few pieces.

    Minimises the mean over clients of ``pieces * (tile + overhead)`` over powers of two, so that one
    client of 50,000 rows does not make ten-row clients read 50,000.
    """
    sizes = np.asarray(sizes)[np.asarray(sizes) > 0]
    if not len(sizes):
        return 1
    largest = int(sizes.max())
    tiles = [t for t in 2 ** np.arange(3, 13) if t < largest] + ([largest] if largest <= 4096 else [])
    cost = [np.mean(-(-sizes // t) * (t + overhead)) for t in tiles]
    return int(tiles[int(np.argmin(cost))])


class Description(dict):
    """What :meth:`FederatedData.describe` found; a dict whose ``str`` is a table."""

    @classmethod
    def of(cls, data: Any) -> "Description":
        sizes = np.asarray(data.sizes)
        out = cls(
            clients=data.num_clients,
            examples=int(sizes.sum()),
            empty_clients=int((sizes == 0).sum()),
            size_min=int(sizes.min()),
            size_median=float(np.median(sizes)),
            size_mean=float(sizes.mean()),
            size_max=int(sizes.max()),
            size_std=float(sizes.std()),
            fields={n: (tuple(a.shape[1:]), str(a.dtype)) for n, a in checks.named_leaves(data.arrays)},
            attrs=sorted(data.attrs),
        )
        labels = checks.label_leaf(data.arrays)
        if labels is not None:
            rows = data.rows_of()
            owner = np.repeat(np.arange(data.num_clients), sizes)
            values, codes = np.unique(np.asarray(labels)[rows], return_inverse=True)
            out["labels"] = len(values)
            pairs = len(np.unique(owner * len(values) + codes))
            out["labels_per_client"] = pairs / max(int((sizes > 0).sum()), 1)
        return out

    def __str__(self) -> str:
        lines = []
        for name, value in self.items():
            if name == "fields":
                lines += [f"{'field ' + n:<20} {d}{list(s)}" for n, (s, d) in value.items()]
            elif value not in ([], None):
                text = (
                    f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
                )
                lines.append(f"{name.replace('_', ' '):<20} {text}")
        return "\n".join(lines)

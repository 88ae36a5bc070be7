"""The synthetic classification data of FedProx and LEAF, with two knobs of heterogeneity."""

import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData, Split

_SIZE_MEAN, _SIZE_SIGMA, _SIZE_MIN = 4.0, 2.0, 50


def synthetic(
    alpha: float,
    beta: float,
    num_clients: int = 30,
    *,
    iid: bool = False,
    seed: int = 0,
    dim: int = 60,
    num_classes: int = 10,
) -> Split:
    """Synthetic(alpha, beta): ``alpha`` sets how much models differ, ``beta`` how much inputs differ.

    Client ``k`` has ``n_k = floor(lognormal(4, 2)) + 50`` examples ``x ~ N(v_k, Sigma)`` with
    ``Sigma = diag(j ** -1.2)`` and labels ``y = argmax(x W_k + b_k)``, where

    - ``u_k ~ N(0, alpha)`` and the entries of ``W_k`` and ``b_k`` are ``N(u_k, 1)``,
    - ``B_k ~ N(0, beta)`` and the entries of ``v_k`` are ``N(B_k, 1)``.

    ``alpha`` and ``beta`` are standard deviations, as in the code of the paper; its text calls them
    variances. With ``iid`` all clients share one ``W`` and ``b`` with entries ``N(0, 1)``, all
    ``v_k`` are 0, and ``alpha`` and ``beta`` play no part. Source: Li et al. 2020, "Federated
    Optimization in Heterogeneous Networks", section 5.1; after Shamir et al. 2014 and LEAF.

    Args:
      alpha: standard deviation of the models' means, at least 0.
      beta: standard deviation of the inputs' means, at least 0.
      num_clients: how many.
      iid: draw all clients' data from one distribution.
      seed: which draw.
      dim: features.
      num_classes: labels ``0..num_classes-1``.

    Returns:
      ``Split(train, test)``, 90 and 10 percent of every client's examples; fields
      ``x: float32[dim]`` and ``y: int32``. ``attrs`` holds what generated the labels:
      ``W: float32[clients, dim, classes]`` and ``b: float32[clients, classes]``.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not value >= 0 or not np.isfinite(value):
            raise ValueError(f"{name} is a standard deviation, so at least 0; got {value!r}")
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(dim, "dim", integer=True)
    checks.positive(num_classes, "num_classes", integer=True)
    rng = checks.generator(seed)
    sizes = rng.lognormal(_SIZE_MEAN, _SIZE_SIGMA, num_clients).astype(int) + _SIZE_MIN
    spread = np.arange(1, dim + 1) ** -0.6  # the square roots of Sigma's diagonal
    W, b, v = _parameters(rng, alpha, beta, num_clients, iid, dim, num_classes)
    clients = []
    for k, size in enumerate(sizes):
        x = v[k] + spread * rng.standard_normal((size, dim))
        y = np.argmax(x @ W[k] + b[k], axis=1)
        clients.append((k, {"x": x.astype(np.float32), "y": y.astype(np.int32)}))
    attrs = {"W": W.astype(np.float32), "b": b.astype(np.float32)}
    return Split(*FederatedData.from_clients(clients, attrs).split(0.9, seed))


def synthetic_iid(num_clients: int = 30, **options) -> Split:
    """Synthetic data without heterogeneity: :func:`synthetic` with ``iid=True``."""
    return synthetic(0.0, 0.0, num_clients, iid=True, **options)


def _parameters(rng, alpha, beta, num_clients, iid, dim, num_classes):
    if iid:
        W, b = rng.standard_normal((dim, num_classes)), rng.standard_normal(num_classes)
        repeat = lambda a: np.broadcast_to(a, (num_clients, *a.shape))
        return repeat(W), repeat(b), np.zeros((num_clients, dim))
    u = rng.normal(0.0, alpha, num_clients)
    W = u[:, None, None] + rng.standard_normal((num_clients, dim, num_classes))
    b = u[:, None] + rng.standard_normal((num_clients, num_classes))
    v = rng.normal(0.0, beta, num_clients)[:, None] + rng.standard_normal((num_clients, dim))
    return W, b, v

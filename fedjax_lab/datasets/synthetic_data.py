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
    # NumPy's older generator, in the published script's order of draws: seed s gives the data that the script
    # gives after numpy.random.seed(s).
    rng = np.random.RandomState(seed)
    sizes = rng.lognormal(_SIZE_MEAN, _SIZE_SIGMA, num_clients).astype(int) + _SIZE_MIN
    u, B = rng.normal(0.0, alpha, num_clients), rng.normal(0.0, beta, num_clients)
    v = np.zeros((num_clients, dim)) if iid else np.stack([rng.normal(B[k], 1.0, dim) for k in range(num_clients)])
    one = _model(rng, 0.0, dim, num_classes) if iid else None
    models, clients = [], []
    for k, size in enumerate(sizes):
        own = _model(rng, u[k], dim, num_classes)
        W, b = one or own
        x = rng.multivariate_normal(v[k], np.diag(np.arange(1, dim + 1) ** -1.2), size)
        y = np.argmax(x @ W + b, axis=1)
        models.append((W, b))
        clients.append((k, {"x": x.astype(np.float32), "y": y.astype(np.int32)}))
    W, b = (np.stack(part) for part in zip(*models, strict=True))
    attrs = {"W": W.astype(np.float32), "b": b.astype(np.float32)}
    return Split(*FederatedData.from_clients(clients, attrs).split(0.9, seed))


def synthetic_iid(num_clients: int = 30, **options) -> Split:
    """Synthetic data without heterogeneity: :func:`synthetic` with ``iid=True``."""
    return synthetic(0.0, 0.0, num_clients, iid=True, **options)


def _model(rng: np.random.RandomState, mean: float, dim: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(mean, 1.0, (dim, num_classes)), rng.normal(mean, 1.0, num_classes)

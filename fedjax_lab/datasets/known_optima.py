"""Generated problems whose optimum is known: quadratics, point estimation, clustered regression."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks
from fedjax_lab.data import FederatedData, Split
from fedjax_lab.models.base import Model


def quadratics(
    num_clients: int = 10,
    dim: int = 5,
    *,
    heterogeneity: float = 1.0,
    condition_number: float = 10.0,
    same_curvature: bool = False,
    seed: int = 0,
) -> FederatedData:
    """Client ``k`` has the loss ``0.5 (w - b_k)' A_k (w - b_k)``, as a single row.

    ``A_k`` is a random rotation of eigenvalues from 1 to ``condition_number``, log-uniform with
    both ends taken (for ``dim`` of at least 2). The minimisers are ``b_k ~ N(0, heterogeneity^2
    I)``. Where the ``A_k`` differ, FedAvg with several local steps ends beside the global optimum
    (:func:`quadratic_optimum`); with ``same_curvature`` it ends in it.

    Args:
      num_clients: how many.
      dim: of ``w``.
      heterogeneity: standard deviation of the minimisers' entries; 0 puts all in the origin.
      condition_number: of every ``A_k``, at least 1.
      same_curvature: give all clients one ``A``.
      seed: which draw.

    Returns:
      FederatedData with fields ``A: float32[dim, dim]`` and ``b: float32[dim]``, one row a client.
      Train with :func:`quadratic_model`.
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(dim, "dim", integer=True)
    _not_negative(heterogeneity, "heterogeneity")
    if not 1 <= condition_number < np.inf:
        raise ValueError(f"condition_number must be at least 1; got {condition_number!r}")
    rng = checks.generator(seed)
    b = heterogeneity * rng.standard_normal((num_clients, dim))
    A = np.stack([_curvature(rng, dim, condition_number) for _ in range(num_clients)])
    if same_curvature:
        A = np.broadcast_to(A[0], A.shape)
    return _by_client({"A": A[:, None], "b": b[:, None]})


def _curvature(rng, dim: int, condition_number: float) -> np.ndarray:
    exponents = rng.random(dim)
    exponents[:2] = (0.0, 1.0)[:dim]
    rotation, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    A = (rotation * condition_number**exponents) @ rotation.T
    return (A + A.T) / 2


def quadratic_model(dim: int) -> Model:
    """The model of :func:`quadratics`: ``params = {"w": float32[dim]}``, zeros at the start."""

    def objective(params, batch):
        away = params["w"][None] - batch["b"]
        return 0.5 * jnp.einsum("ni,nij,nj->n", away, batch["A"], away)

    return _vector_model(dim, objective)


def quadratic_optimum(data: FederatedData, weights: Any = None) -> np.ndarray:
    """The minimiser of ``sum_k p_k F_k`` for :func:`quadratics`, ``float64[dim]``.

    Args:
      data: from :func:`quadratics`.
      weights: ``p_k`` up to a factor, ``[clients]``; by default all equal, as for weighting by
        examples, since every client has one.
    """
    A, b = (np.asarray(data.arrays[name], np.float64) for name in ("A", "b"))
    p = np.ones(len(A)) if weights is None else np.asarray(weights, np.float64)
    if p.shape != (len(A),):
        raise ValueError(f"weights must have one entry for each of {len(A)} clients; got {p.shape}")
    return np.linalg.solve(np.einsum("k,kij->ij", p, A), np.einsum("k,kij,kj->i", p, A, b))


def point_estimation(
    num_clients: int = 8,
    n: int = 30,
    *,
    sigma: float = 0.8,
    tau: float = 0.1,
    num_attacked: int = 0,
    tau_attacked: float = 0.0,
    center: float = 0.0,
    dim: int = 1,
    seed: int = 0,
) -> FederatedData:
    """Federated point estimation, where the best trade between local and global is known.

    Client ``k`` observes ``n`` points ``x ~ N(w_k, sigma^2)`` around its own ``w_k``, and
    ``w_k ~ N(center, tau^2)``: the smaller ``tau``, the more alike the clients are. Attacked
    clients, drawn at random, have ``w_k ~ N(center, tau_attacked^2)`` instead. Coordinates are
    independent.
    Source: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization",
    section 3.3 and appendix (there ``K``, ``K_a``, ``tau_a``).

    Args:
      num_clients: K.
      n: points of each client.
      sigma: standard deviation of a client's points.
      tau: standard deviation of the clients' truths.
      num_attacked: K_a, at most K.
      tau_attacked: tau_a, the attacked clients' standard deviation; needed if there are any.
      center: the mean of the truths.
      dim: coordinates of a point.
      seed: which draw.

    Returns:
      FederatedData with the field ``x: float32[dim]`` and the attributes ``w: float32[clients,
      dim]`` and ``attacked: bool[clients]``. Train with :func:`point_model`.
    """
    checks.positive(num_clients, "num_clients", integer=True)
    checks.positive(n, "n", integer=True)
    checks.positive(dim, "dim", integer=True)
    _not_negative(sigma, "sigma")
    _not_negative(tau, "tau")
    if not 0 <= num_attacked <= num_clients:
        raise ValueError(f"num_attacked must be 0 to {num_clients} clients; got {num_attacked!r}")
    if num_attacked:
        checks.positive(tau_attacked, "tau_attacked")
    rng = checks.generator(seed)
    attacked = rng.permutation(num_clients) < num_attacked
    spread = np.where(attacked, tau_attacked, tau)[:, None]
    w = center + spread * rng.standard_normal((num_clients, dim))
    x = w[:, None] + sigma * rng.standard_normal((num_clients, n, dim))
    attrs = {"w": w.astype(np.float32), "attacked": attacked}
    return _by_client({"x": x}, attrs)


def point_model(dim: int = 1) -> Model:
    """The model of :func:`point_estimation`: loss ``0.5 |w - x|^2``, ``params = {"w": [dim]}``."""

    def objective(params, batch):
        return 0.5 * jnp.sum((params["w"][None] - batch["x"]) ** 2, axis=1)

    return _vector_model(dim, objective)


def clustered_regression(
    num_clients: int = 40,
    clusters: int = 2,
    *,
    n: int = 50,
    dim: int = 10,
    separation: float = 2.0,
    noise: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Split:
    """Linear regression where each client belongs to one of a few clusters.

    ``y = x . w_c + noise * N(0, 1)`` with ``x ~ N(0, I)`` and ``c`` the client's cluster. The
    clusters' ``w_c`` have random directions and the length ``separation / sqrt(2)``, so that two
    of them are ``separation`` apart on average, exactly so where they are orthogonal, which they
    are up to ``dim`` clusters. Clusters are of equal size to within one client. After Ghosh et
    al. 2020, "An Efficient Framework for Clustered Federated Learning", section 6.1.

    Returns:
      ``Split(train, test)``; fields ``x: float32[dim]`` and ``y: float32``; attributes
      ``cluster: int32[clients]`` and ``w: float32[clients, dim]``, the truth.
    """
    for name, value in (("num_clients", num_clients), ("clusters", clusters), ("n", n)):
        checks.positive(value, name, integer=True)
    checks.positive(dim, "dim", integer=True)
    _not_negative(separation, "separation")
    _not_negative(noise, "noise")
    if clusters > num_clients:
        raise ValueError(f"{num_clients} clients can't fill {clusters} clusters")
    rng = checks.generator(seed)
    directions = rng.standard_normal((dim, clusters))
    if clusters <= dim:
        directions, _ = np.linalg.qr(directions)
    centers = (directions / np.linalg.norm(directions, axis=0)).T * separation / np.sqrt(2)
    cluster = rng.permutation(num_clients) % clusters
    x = rng.standard_normal((num_clients, n, dim))
    y = np.einsum("kni,ki->kn", x, centers[cluster])
    y = y + noise * rng.standard_normal((num_clients, n))
    attrs = {"cluster": cluster.astype(np.int32), "w": centers[cluster].astype(np.float32)}
    return Split(*_by_client({"x": x, "y": y}, attrs).split(1 - test_fraction, seed))


def _by_client(arrays: dict[str, np.ndarray], attrs: Any = None) -> FederatedData:
    """From arrays ``[clients, rows, ...]``."""
    single = {name: np.asarray(a, np.float32) for name, a in arrays.items()}
    count = len(next(iter(single.values())))
    rows = [(k, {name: a[k] for name, a in single.items()}) for k in range(count)]
    return FederatedData.from_clients(rows, attrs)


def _vector_model(dim: int, objective) -> Model:
    def init(key):
        return {"w": jnp.zeros(dim)}, ()

    def loss(params, model_state, batch, mask, key, train):
        return objective(params, batch), model_state

    def metrics(params, model_state, batch):
        return {"loss": objective(params, batch)}

    return Model(init, loss, metrics)


def _not_negative(value: float, name: str) -> None:
    if not value >= 0 or not np.isfinite(value):
        raise ValueError(f"{name} must be at least 0; got {value!r}")

"""Evaluation as a Round: clients compute metrics on their own examples, only the metrics travel.

Every function here gives an ``evaluate(process, state) -> {name: float}``, which ``run`` and ``sweep`` take.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from fedjax_lab import aggregators, checks, compiling
from fedjax_lab.cohort import make_env, run_cohort
from fedjax_lab.data import FederatedData
from fedjax_lab.local import mean_over_client
from fedjax_lab.process import Process
from fedjax_lab.round import ClientOutput, Round, identity
from fedjax_lab.sharding import placed
from fedjax_lab.states import ClientStates

PyTree = Any
Evaluate = Callable[[Process, Any], dict[str, float]]
_WORSE_WHEN_HIGHER = ("loss", "error", "perplexity")  # anywhere in a name, and these as a word of it:
_WORDS = frozenset(("err", "mse", "rmse", "mae", "mape", "nll", "bpc", "se", "cost", "regret", "risk"))


def worse_when_higher(name: str) -> bool:
    """Whether a metric's name says that less is better: losses, errors, perplexities, ``mse``, ``nll``, ..."""
    name = name.lower()
    words = re.split(r"[^a-z]+", name)
    return any(word in name for word in _WORSE_WHEN_HIGHER) or not _WORDS.isdisjoint(words)


class Evaluation(NamedTuple):
    """An evaluation in two halves, of which a sweep runs the first for many cells in one program.

    Attributes:
      arrays: ``(process, state) -> pytree`` of arrays; pure, so that it may be traced.
      numbers: ``(the same pytree as NumPy arrays) -> what the evaluation gives``, on the host.
    """

    arrays: Callable[[Process, Any], PyTree]
    numbers: Callable[[PyTree], Any]

    def __call__(self, process: Process, state: PyTree) -> Any:
        return self.numbers(jax.device_get(self.arrays(process, state)))


class ClientMetrics(NamedTuple):
    """Metrics of single clients.

    Attributes:
      values: ``{name: float32[clients]}``, means over each client's examples.
      examples: ``int[clients]``, how many those were; 0 where a client has none (its values are 0) or
        where its values are not finite.
      non_finite: ``bool[clients]``, clients with examples, whose values or examples are not finite; they count as
        absent.
    """

    values: dict[str, np.ndarray]
    examples: np.ndarray
    non_finite: Any = False


def evaluation_round(round: Round, own: Callable[[Any, Any], Any], personal: bool) -> Round:
    """The Round whose upload is a client's mean metrics, weighted by its examples.

    Args:
      round: whose model is evaluated, and whose broadcast brings it to the client.
      own: ``(position, env) -> ClientData`` of the client's training data, which personalisation uses.
      personal: evaluate the model that the client would use, rather than the one it was sent.
    """
    if round.metrics is None or not (personal or shares_model(round)):
        raise ValueError("this Round has no model metrics to evaluate (Round.metrics and Round.view)")

    def seen(client):
        return dataclasses.replace(own(client.id, client.env), for_use=personal)

    def client_update(message, state, client, key, tilt=identity):
        if personal:
            variables = round.personalize(message, state, seen(client), key)
        else:
            variables = message if "sub_models" in round.traits else round.view.get(message)
        values = mean_over_client(lambda batch, mask: round.metrics(*variables, batch), client)
        return ClientOutput(values, client.size, state, metrics=values)

    broadcast = lambda server, state, client, key: round.broadcast(server, state, seen(client), key)
    if not personal and "sub_models" in round.traits:  # what all share is the whole, of which each is sent a part
        broadcast = lambda server, state, client, key: round.model.get(server)
    return round._replace(
        init_client=lambda server, client: round.init_client(server, seen(client)),
        broadcast=broadcast,
        client_update=client_update,
        aggregate=aggregators.mean(),
        server_update=lambda server, metrics, key: (server, metrics),
    )


def shares_model(round: Round) -> bool:
    """Whether clients are sent one whole model: local training sends none, ``private`` a part, ``clusters`` several."""
    return round.view is not None and not {"partial", "many_models"} & round.traits


def client_metrics(test: FederatedData, support: FederatedData | None = None, *, personal: bool = False) -> Evaluation:
    """Every client's own metrics, ``(process, state) -> ClientMetrics`` in the order of ``test.ids``.

    Args:
      test: the examples to evaluate on. Its clients are found among the process's by their ids, for
        their states and training data; those that aren't there are unseen and have neither.
      support: what the clients personalise on instead of their training data, over the same ids as
        ``test``; the only way for unseen ones.
      personal: evaluate each client's personalised model (``Round.personalize``).
    """
    checks.federated(test, "what to evaluate on", empty=True)
    if support is not None:
        checks.federated(support, "support", empty=True)
    if support is not None and list(support.ids) != list(test.ids):
        raise ValueError("support must hold the same clients as test, in the same order")
    compiled: dict[int, Any] = {}  # by identity of what the closure depends on

    def make(process: Process):
        # Checks the examples against the model, and computes nothing.
        jax.eval_shape(lambda key: process.round.init(key, test), jax.random.key(0))
        home = _positions(test, process.data)
        with jax.ensure_compile_time_eval():  # within a larger program, too, the examples lie on their devices
            here, specs = beside(test, process)
            adapt, adapt_specs = (None, P()) if support is None else beside(support, process)
        function = _compile(process, personal, np.asarray(test.sizes), specs, adapt_specs)
        return process.round, home, here, adapt, function

    def arrays(process: Process, state: PyTree) -> ClientMetrics:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
            made = make(process)  # not to be kept: the Round may hold traced values, which die with their program
        elif (made := compiled.get(id(process.round))) is None:
            made = compiled[id(process.round)] = make(process)
        _, home, here, adapt, function = made
        number = jnp.asarray(getattr(state, "round", 0), jnp.int32)  # schedules over rounds go by it
        server, clients = process.server(state), process.clients(state)
        with unlike_training(test, process.data):
            sizes, values, lost = function(server, clients, process.data, here, adapt, home, number)
        return ClientMetrics(values, sizes, lost)

    return Evaluation(arrays, lambda metrics: metrics)


@contextlib.contextmanager
def unlike_training(test: FederatedData, train: FederatedData) -> Iterator[None]:
    """If the model can't be computed on examples of other shapes than it is trained on, say that this is why.

    A model that takes inputs of several shapes is free to: nothing is refused beforehand.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError:  # the device's: it has nothing to do with shapes
        raise
    except Exception as error:  # libraries of layers raise their own
        known = dict(checks.named_leaves(train.arrays))
        other = [
            f"{name} has shape {a.shape[1:]}, in training {known[name].shape[1:]}"
            for name, a in checks.named_leaves(test.arrays)
            if name in known and a.shape[1:] != known[name].shape[1:]
        ]
        if not other:
            raise
        raise ValueError(
            f"the model can't be evaluated on these examples: of one example {'; '.join(other)}. Give both the same "
            "shape"
        ) from error


def beside(test: FederatedData, process: Process) -> tuple[FederatedData, PyTree]:
    """Examples on the devices of the process, and how they lie there: each client's beside its training data."""
    if isinstance(process.specs, FederatedData):
        if test.id_table is not process.data.id_table:
            raise ValueError(
                "with several processes every device evaluates its own clients: evaluate on a part of the training "
                "population's own examples, data.split(...), or other clients in a run of one process"
            )
        there = placed(test, process.mesh)
        return there.data, there.specs
    return test.on_device(), P()


def _positions(test: FederatedData, train: FederatedData) -> np.ndarray:
    """Where each test client stands in the training population; -1 if it was never part of it."""
    if test.id_table is train.id_table:
        return np.arange(test.num_clients, dtype=np.int32)
    known = {i: k for k, i in enumerate(train.ids)}
    return np.asarray([known.get(i, -1) for i in test.ids], np.int32)


def _compile(process: Process, personal: bool, sizes: np.ndarray, specs: PyTree, support_specs: PyTree):
    round, mesh = process.round, process.mesh

    def function(server, clients: ClientStates, train, test, support, home, number):
        def made(beside):
            train, support, home = beside

            def own(position, env):
                seat = home[jnp.clip(position, 0, test.num_clients - 1)]
                if support is None:
                    return train.view(seat, env)
                own_id = jnp.where(seat >= 0, seat, train.num_clients)
                return dataclasses.replace(support.view(position, env), id=own_id)

            return evaluation_round(round, own, personal)

        states = clients
        if jax.tree.leaves(clients.table) and not isinstance(specs, FederatedData):
            seat = jnp.maximum(home, 0)
            rows = jax.tree.map(lambda t: t[seat], clients.table)
            states = ClientStates(rows, clients.known[seat] & (home >= 0))
        key = jax.random.key(0)
        everybody = jnp.arange(test.num_clients)
        env = make_env(number, key, everybody, jnp.ones(test.num_clients, bool), test.num_clients)
        answers = run_cohort(
            made, server, states, test, env, key,
            mesh=mesh, sizes=sizes, data_specs=specs,
            beside=(train, support, home), beside_specs=(process.specs, support_specs, P()),
        )  # fmt: skip
        keep = lambda x: jnp.where(answers.ok, x, 0)
        values = {n: keep(v) for n, v in answers.metrics.items()}
        return keep(answers.weights).astype(jnp.int32), values, (test.sizes > 0) & ~answers.ok

    return compiling.jit(function, mesh)


def global_metrics(test: FederatedData) -> Evaluate:
    """The global model's metrics over all of ``test``'s examples, ``{"accuracy": ..., "loss": ...}``.

    A client whose values or examples are not finite counts as absent; ``non_finite_clients`` says how many there are,
    if any.
    """
    return Evaluation(client_metrics(test).arrays, lambda metrics: pooled(metrics) | _absent(metrics))


def per_client(
    test: FederatedData,
    support: FederatedData | None = None,
    *,
    names: str | Sequence[str] | None = None,
    prefix: str = "",
) -> Evaluate:
    """Metrics over all examples, and how they differ between clients.

    For each metric ``m``: ``m`` over all examples; over clients (those with examples) ``m_mean``,
    ``m_variance``, ``m_p10``, ``m_p50``, ``m_p90`` and ``m_worst10``, the mean of the worst tenth. When the
    Round personalises (trait ``"personal"``), the same of each client's own model as ``personal_m...``; if no
    whole model is sent to the clients, these are the only ones. A client whose values or examples are not finite, such
    as one whose own model diverged, counts as absent; ``non_finite_clients`` says how many there are, if any.

    Args:
      test: examples to evaluate on.
      support: see :func:`client_metrics`; evaluates clients that never took part.
      names: only these metrics; one may be given by itself.
      prefix: put before every name, for instance ``"unseen_"``.
    """
    plain, own = client_metrics(test, support), client_metrics(test, support, personal=True)

    def arrays(process, state):
        personal, found = "personal" in process.round.traits, {}
        if shares_model(process.round) or not personal:
            found[prefix] = plain.arrays(process, state)
        if personal:
            found[f"{prefix}personal_"] = own.arrays(process, state)
        return found

    def numbers(found):
        return merged(summarise(metrics, names, before) for before, metrics in found.items())

    return Evaluation(arrays, numbers)


def per_client_accuracy(test: FederatedData, support: FederatedData | None = None) -> Evaluate:
    """:func:`per_client` of the accuracy alone."""
    return per_client(test, support, names=("accuracy",))


def combined(*evaluations: Evaluate) -> Evaluate:
    """Several evaluations in one; later ones win where names repeat.

    A sweep runs it side by side if each has the two halves of an :class:`Evaluation`.
    """

    halves = [each for each in evaluations if isinstance(each, Evaluation)]
    if len(halves) < len(evaluations):
        return lambda process, state: merged(each(process, state) for each in evaluations)
    return Evaluation(
        lambda process, state: [each.arrays(process, state) for each in halves],
        lambda found: merged(each.numbers(own) for each, own in zip(halves, found, strict=True)),
    )


def merged(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    return {name: value for part in parts for name, value in part.items()}


def pooled(metrics: ClientMetrics) -> dict[str, float]:
    """Means over all examples; NaN where no client has a finite value, as when training diverged."""
    total = float(metrics.examples.sum()) or np.nan
    return {n: float((v.astype(np.float64) * metrics.examples).sum() / total) for n, v in metrics.values.items()}


def _absent(metrics: ClientMetrics, prefix: str = "") -> dict[str, float]:
    """How many clients' values were left out for not being finite, if any: without it, a mean hides them."""
    count = float(np.sum(metrics.non_finite))
    return {f"{prefix}non_finite_clients": count} if count else {}


def summarise(metrics: ClientMetrics, names: str | Sequence[str] | None = None, prefix: str = "") -> dict[str, float]:
    """The summary that :func:`per_client` describes."""
    names = (names,) if isinstance(names, str) else names
    unknown = set(names or ()) - set(metrics.values)
    if unknown:
        raise ValueError(f"the model has no metric {sorted(unknown)}; it has {sorted(metrics.values)}")
    overall, out = pooled(metrics), {}
    for name in names or metrics.values:
        values = np.sort(metrics.values[name][metrics.examples > 0].astype(np.float64))
        values = values if len(values) else np.array([np.nan])
        worst = values[::-1] if worse_when_higher(name) else values
        tenth = max(1, -(-len(values) // 10))
        out |= {
            f"{prefix}{name}": overall[name],
            f"{prefix}{name}_mean": float(values.mean()),
            f"{prefix}{name}_variance": float(values.var()),
            **{f"{prefix}{name}_p{p}": float(np.percentile(values, p)) for p in (10, 50, 90)},
            f"{prefix}{name}_worst10": float(worst[:tenth].mean()),
        }
    return out | _absent(metrics, prefix)

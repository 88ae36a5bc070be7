"""How long messages and uploads are, client by client, and how long they take on a given link."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fedjax_lab import checks
from fedjax_lab.client import ClientData
from fedjax_lab.round import Round, Transform, identity, nbytes, upload_bytes

LEAST = "at least 0"


def transfers(*, up: Any = None, down: Any = None, latency: Any = 0.0) -> Transform:
    """Report each client's bytes, and the seconds they take: put it last, behind uplink and downlink.

    Adds the metrics ``upload_size`` and ``download_size`` in bytes, and with rates ``transfer_seconds``: twice the
    latency, and bytes over rate each way. As all metrics they are means over the survivors, by weight; samplers are
    given each client's own. Exact totals are ``uplink_bytes`` and ``downlink_bytes``.

    Args:
      up, down: rates in bytes per second: a number, an array with one for each client of the population, or the
        name of a client attribute. ``None``: as fast as you like.
      latency: seconds each way, in any of the same forms.

    Raises:
      ValueError: rates that aren't positive, a negative latency; an attribute that clients don't have, or an array of
        another length than the population, when the process is built.
    """
    for name, rate in (("up", up), ("down", down)):
        if rate is not None:
            _check(rate, name, "positive")
    _check(latency, "latency", LEAST)
    timed = up is not None or down is not None or not (isinstance(latency, int | float) and latency == 0)

    def transform(round: Round) -> Round:
        def client_update(message, state, client, key, tilt=identity):
            out = round.client_update(message, state, client, key, tilt=tilt)
            sent = upload_bytes(out)
            sizes = {
                "upload_size": jnp.where(jnp.asarray(out.sent, bool), jnp.float32(sent), 0),
                "download_size": jnp.float32(nbytes(message)),
            }
            more = {}
            if timed:
                times = [2 * of(client, latency)]
                times += [sizes["upload_size"] / of(client, up)] if up is not None else []
                times += [sizes["download_size"] / of(client, down)] if down is not None else []
                more = {"transfer_seconds": sum(times)}
            return out._replace(metrics=out.metrics | sizes | more)

        def init(key, data, params=None):
            for name, value, least in (("up", up, "positive"), ("down", down, "positive"), ("latency", latency, LEAST)):
                values = data.attrs.get(value) if isinstance(value, str) else None
                if values is not None:
                    _check(values, f"{name}, the client attribute {value!r},", least)
            return round.init(key, data, params)

        return round._replace(init=init, client_update=client_update)

    return transform


def of(client: ClientData, value: Any) -> Any:
    """A number, or the client's own one of an array or an attribute."""
    if isinstance(value, str):
        if value not in client.attrs:
            near = checks.nearest(value, client.attrs)
            raise ValueError(f"clients have no attribute {value!r}{near or f'; they have {sorted(client.attrs)}'}")
        return jnp.asarray(client.attrs[value], jnp.float32)
    table, population = jnp.asarray(value, jnp.float32), getattr(client, "population", None)
    if table.ndim and population not in (None, table.shape[0]):
        raise ValueError(f"numbers for {table.shape[0]} clients were given for a population of {population}")
    return table[jnp.clip(client.id, 0, table.shape[0] - 1)] if table.ndim else table


def _check(value: Any, name: str, least: str) -> None:
    if isinstance(value, str | Tracer):
        return
    values = np.asarray(value)  # jax.numpy's has no value in a sweep, whatever is swept
    good = values.ndim <= 1 and values.size > 0 and values.dtype.kind in "iuf" and np.isfinite(values).all()
    if not good or not ((values > 0) if least == "positive" else (values >= 0)).all():
        raise ValueError(
            f"{name} must be a number {least}, one for each client, or an attribute's name; got {checks.shown(value)}"
        )

"""A state's leaves outside JAX: named, described, digested, compared, and put back where they were."""

import hashlib
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lab import checks, hosts

PyTree = Any


class Leaf(NamedTuple):
    """One leaf of a state on the host: ``impl`` names the generator of a PRNG key, else ``None``."""

    name: str
    value: np.ndarray
    impl: str | None

    def describe(self) -> dict[str, Any]:
        shape = list(self.value.shape)
        dtype = np.dtype(self.value.dtype).name
        return {"name": self.name, "shape": shape, "dtype": dtype, "impl": self.impl}


def host_leaves(state: PyTree) -> list[Leaf]:
    """A state's leaves as NumPy arrays, typed PRNG keys by their data."""
    leaves = []
    for name, leaf in checks.named_leaves(state):
        impl = _impl(leaf)
        value = leaf if impl is None else jax.random.key_data(leaf)
        leaves.append(Leaf(name, hosts.whole(value) if isinstance(value, jax.Array) else np.asarray(value), impl))
    return leaves


def described(state: PyTree) -> list[dict[str, Any]]:
    """What :meth:`Leaf.describe` would say of a state's leaves, without moving them to the host."""
    descriptions = []
    for name, leaf in checks.named_leaves(state):
        impl = _impl(leaf)
        shape = leaf if impl is None else jax.eval_shape(jax.random.key_data, leaf)
        dtype = np.dtype(shape.dtype).name
        descriptions.append({"name": name, "shape": list(shape.shape), "dtype": dtype, "impl": impl})
    return descriptions


def digest(leaves: list[Leaf]) -> str:
    """SHA-256 over the leaves' names, shapes, types and bits."""
    total = hashlib.sha256()
    for leaf in leaves:
        total.update(json.dumps(leaf.describe(), sort_keys=True).encode())
        total.update(np.ascontiguousarray(leaf.value).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def state_digest(state: PyTree) -> str:
    """SHA-256 over a state's names, shapes, types and bits: equal only for bit-equal states."""
    return digest(host_leaves(state))


def first_difference(there: list[dict], here: list[dict]) -> str | None:
    """The first leaf in which a stored state's description differs from a process's, in words."""
    told = lambda e: f"{e['impl'] + ' key ' if e['impl'] else ''}{e['dtype']}{e['shape']}"
    known = {e["name"]: e for e in here}
    stored = {e["name"] for e in there}
    for old in there:
        new = known.get(old["name"])
        if new is None:
            return f"its leaf {old['name']} ({told(old)}) does not exist in this process's state"
        if new != old:
            return f"its leaf {old['name']} is {told(old)}, this process's is {told(new)}"
    for new in here:
        if new["name"] not in stored:
            return f"this process's leaf {new['name']} ({told(new)}) is not in it"
    return None if there == here else "its leaves have another order"


def place(leaf: Leaf, like: Any) -> Any:
    """The leaf in memory of its own, where ``like`` is: on the same devices, or on the host."""
    if isinstance(like, np.ndarray):
        return np.array(leaf.value)
    array = jnp.asarray(leaf.value)
    if leaf.impl is not None:
        array = jax.random.wrap_key_data(array, impl=leaf.impl)
    if like.committed:
        array = jax.device_put(array, like.sharding)
    return jnp.copy(array)


def own_copy(state: PyTree) -> PyTree:
    """The same state in memory that nobody else holds, so that it may be donated; strongly typed."""
    leaves, structure = jax.tree.flatten(state)
    del state
    for i, leaf in enumerate(leaves):  # one by one: no second whole copy at any time
        array = jnp.asarray(leaf)
        if _impl(array) is None:
            array = jax.lax.convert_element_type(array, array.dtype)
        leaves[i] = jnp.copy(array)
    return jax.tree.unflatten(structure, leaves)


def _impl(leaf: Any) -> str | None:
    is_key = jnp.issubdtype(getattr(leaf, "dtype", bool), jax.dtypes.prng_key)
    return str(jax.random.key_impl(leaf)) if is_key else None

"""What tells a traced program from every other: a digest of its equations and of all that compiling them reads.

Two programs with one digest are the same machine code. So everything counts: each equation's primitive, parameters,
operands and surroundings, the types of all values, the numbers in closed-over arrays, JAX's settings, XLA's flags, the
processor. What is not known to say it all, such as a Python function among an equation's parameters, gets no digest.
"""

import enum
import functools
import hashlib
import os
import pathlib
import platform
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fedjax_lab.devices import THREADS, cores

# Closed-over numbers beyond which reading them takes longer than it saves.
MOST_BYTES = 1 << 26
# A derivative's rule is looked at when a program is traced; what is compiled is the call's own program.
RULES = {
    "custom_jvp_call": {"jvp_jaxpr_fun"},
    "custom_vjp_call": {"fwd_jaxpr_thunk", "bwd", "out_trees"},
    "custom_vjp_call_jaxpr": {"fwd_jaxpr_thunk", "bwd", "out_trees"},
}
# Their code is not JAX's own, and may be another's tomorrow under the same name.
FOREIGN = ("ffi", "callback", "pallas", "tpu_custom", "host_local", "infeed", "outfeed")
# JAX's own kinds of random bits; how others make theirs is not among the equations.
KEYS = ("key<fry>", "key<rbg>", "key<urbg>")
# Settings of JAX's that say where something is kept or what is told of it.
ASIDE = ("cache", "log", "traceback", "debug_nans", "profil", "dump", "explain")


class Unknown(Exception):
    """A part of a program whose description doesn't say all."""


def of(program: ClosedJaxpr, *besides: Any) -> str | None:
    """A digest of a traced program; ``None`` if it holds what can't be told.

    Args:
      program: of ``jax.jit(...).trace(...)``.
      *besides: what else is read when it is compiled: options, shardings; of the kinds that equations' parameters have.

    Returns:
      64 hexadecimal digits.
    """
    try:
        parts = _Parts()
        return parts.digest((surroundings(), settings(), *besides), program)
    except (Unknown, AttributeError):  # the latter where another version of JAX has no such fact
        return None


@functools.cache
def surroundings() -> tuple[str, ...]:
    """Versions, flags, the processor, its threads and the devices."""
    flags = [f"{name}={value}" for name, value in sorted(os.environ.items()) if "XLA_" in name or name == THREADS]
    devices = [f"{d.platform} {d.device_kind} {d.id} {d.process_index}" for d in jax.devices()]
    version = jax.devices()[0].client.platform_version
    return (jax.__version__, jaxlib.__version__, sys.version, version, _processor(), str(cores()), *flags, *devices)


def _processor() -> str:
    """Its kind and what it can do, where the system says."""
    facts = pathlib.Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(told)])


def settings() -> tuple[str, ...]:
    """JAX's settings, as they hold here and now: of the process, or of a ``with`` around."""
    names = [name for name in jax.config.values if not any(word in name for word in ASIDE)]
    return tuple(f"{name}={getattr(jax.config, name, jax.config.values[name])!r}" for name in sorted(names))


class _Parts:
    """One program's parts as text; equal parts are described once."""

    def __init__(self):
        self.types: dict[Any, str] = {}
        self.contexts: dict[int, str] = {}
        self.programs: dict[int, str] = {}
        self.held: list[Any] = []  # so that no other object takes on an id
        self.bytes = 0

    def digest(self, besides: Any, program: ClosedJaxpr) -> str:
        return _hash([self.told(besides), self.program(program)])

    def program(self, program: ClosedJaxpr | Jaxpr) -> str:
        if id(program) not in self.programs:
            self.held.append(program)
            closed = isinstance(program, ClosedJaxpr)
            consts = [self.array(const) for const in program.consts] if closed else []
            jaxpr = program.jaxpr if closed else program
            self.programs[id(program)] = _hash([*consts, *self.lines(jaxpr)])
        return self.programs[id(program)]

    def lines(self, jaxpr: Jaxpr) -> Iterator[str]:
        names: dict[Any, str] = {}

        def named(v) -> str:
            if isinstance(v, Literal):
                return f"{self.number(v.val)}:{self.type(v.aval)}"
            if v not in names:
                names[v] = f"v{len(names)}:{self.type(v.aval)}"
            return names[v]

        yield ",".join(map(named, jaxpr.constvars)) + ";" + ",".join(map(named, jaxpr.invars))
        for eqn in jaxpr.eqns:
            operands, results = ",".join(map(named, eqn.invars)), ",".join(map(named, eqn.outvars))
            yield f"{results}={self.equation(eqn)}({operands})"
        yield ",".join(map(named, jaxpr.outvars)) + self.effects(jaxpr.effects)

    def equation(self, eqn: JaxprEqn) -> str:
        name = eqn.primitive.name
        if eqn.primitive not in _primitives() or any(word in name for word in FOREIGN):
            raise Unknown(name)
        rules = RULES.get(name, ())
        told = [f"{key}={self.told(value)}" for key, value in sorted(eqn.params.items()) if key not in rules]
        return f"{name}[{' '.join(told)}]{self.context(eqn.ctx)}{self.effects(eqn.effects)}"

    def effects(self, effects: Any) -> str:
        return " ".join(sorted(map(_shown, effects)))

    def context(self, context: Any) -> str:
        """What surrounded an equation when it was traced: meshes, the kind of random bits, a place to compute on."""
        if id(context) not in self.contexts:
            self.held.append(context)
            self.contexts[id(context)] = _shown(context)
        return self.contexts[id(context)]

    def type(self, aval: Any) -> str:
        try:
            return self.types[aval]
        except KeyError:
            kind = getattr(aval, "dtype", None)
            facts = [kind, *(getattr(aval, name, None) for name in ("weak_type", "sharding", "vma", "memory_space"))]
            self.types[aval] = (
                f"{type(aval).__name__}{_shown(aval)}"
                + "|".join(map(self.told, facts[:2]))
                + "|".join(map(_shown, facts[2:]))
            )
            return self.types[aval]

    def told(self, x: Any) -> str:
        """A parameter's value with its kind."""
        if x is None or isinstance(x, (bool, int, float, complex, str, bytes)):
            return f"{type(x).__name__} {x!r}"
        if isinstance(x, (ClosedJaxpr, Jaxpr)):
            return self.program(x)
        if isinstance(x, (tuple, list)):
            return f"{type(x).__qualname__}({','.join(map(self.told, x))})"
        if isinstance(x, dict):
            return f"dict({','.join(f'{self.told(k)}:{self.told(v)}' for k, v in x.items())})"
        if isinstance(x, (set, frozenset)):
            return f"set({','.join(sorted(map(self.told, x)))})"
        if isinstance(x, (np.ndarray, np.generic, jax.Array)):
            return self.array(x)
        if isinstance(x, enum.Enum):
            return f"{type(x).__qualname__}.{x.name}"
        if isinstance(x, np.dtype):
            return f"dtype {x.name}"
        return self.object(x)

    def object(self, x: Any) -> str:
        if isinstance(x, Mesh):
            return f"{_shown(x)} on {[] if x.empty else [device.id for device in x.devices.flat]}"
        if isinstance(x, NamedSharding):
            return f"{_shown(x)} {self.told(x.mesh)}"
        if isinstance(x, SingleDeviceSharding):
            return f"{_shown(x)} {[device.id for device in x.device_set]}"
        if isinstance(x, (AbstractMesh, PartitionSpec)) or str(x) in KEYS:
            return _shown(x)
        if _of_jax(x):
            return f"{x.__module__}.{x.__qualname__}"
        if _of_jax(type(x)) and not getattr(x, "__dict__", ()) and not getattr(x, "__slots__", ()):
            return f"a {type(x).__module__}.{type(x).__qualname__}"
        raise Unknown(type(x).__name__)

    def number(self, value: Any) -> str:
        return self.array(np.asarray(value)) + type(value).__name__

    def array(self, x: Any) -> str:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return f"{x.dtype} {self.array(jax.random.key_data(x))}"
        if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
            raise Unknown("an array that can't be read")
        self.bytes += x.nbytes
        if self.bytes > MOST_BYTES:
            raise Unknown("many closed-over numbers")
        return f"{x.dtype}{x.shape} {hashlib.sha256(np.asarray(x).tobytes()).hexdigest() if x.size else ''}"


def _hash(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _shown(x: Any) -> str:
    text = repr(x)
    if " at 0x" in text:
        raise Unknown(text)
    return text


def _of_jax(x: Any) -> bool:
    """A function or class that JAX has under a name of a module's, and which closes over nothing."""
    name, module = getattr(x, "__qualname__", None) or "", getattr(x, "__module__", None) or ""
    return module.split(".")[0] in ("jax", "jaxlib") and getattr(sys.modules.get(module), name, None) is x


@functools.cache
def _primitives() -> frozenset[Primitive]:
    """Those that JAX defines: others' rules for compiling may change while JAX's version doesn't."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("jax._src.")]
    values = (value for module in modules for value in vars(module).values())
    return frozenset(value for value in values if isinstance(value, Primitive))

"""Which experiments there are: the modules of this package that have what an experiment has."""

import importlib
import pkgutil
from types import ModuleType

import experiments
from fedjax_lab import checks


class UnknownExperiment(ValueError):
    """No experiment has this name."""


def find() -> dict[str, ModuleType]:
    """The experiments by name, in alphabetical order."""
    names = [m.name for m in pkgutil.iter_modules(experiments.__path__) if not m.ispkg and m.name != "__main__"]
    modules = {name: importlib.import_module(f"experiments.{name}") for name in names}
    return {n: m for n, m in modules.items() if all(hasattr(m, part) for part in ("Config", "main", "QUICK"))}


def published() -> dict[str, ModuleType]:
    """Those that reproduce published figures."""
    return {name: module for name, module in find().items() if hasattr(module, "PAPER")}


def get(name: str, known: dict[str, ModuleType]) -> ModuleType:
    """One of them. Raises UnknownExperiment with the nearest name."""
    if name not in known:
        near = checks.nearest(name, known) or f"; there are {', '.join(known)}"
        raise UnknownExperiment(f"unknown experiment {name!r}{near}")
    return known[name]


def headline(module: ModuleType) -> str:
    """The first line of its docstring."""
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".")

"""fedjax_lab: federated learning and analytics as pure functions in JAX."""

from fedjax_lab.client import ClientData
from fedjax_lab.data import FederatedData, Split
from fedjax_lab.models.base import Model, Variables

__all__ = ["ClientData", "FederatedData", "Model", "Split", "Variables"]

"""fedjax_lab: federated learning and analytics as pure functions in JAX."""

from fedjax_lab import (
    aggregators,
    callbacks,
    checks,
    datasets,
    devices,
    ensembles,
    hosts,
    matching,
    models,
    plots,
    transforms,
    variational,
    wire,
)
from fedjax_lab.client import ClientData
from fedjax_lab.cohort import total_bytes
from fedjax_lab.cold_start import cold_start
from fedjax_lab.data import FederatedData, Split
from fedjax_lab.descent import goes_downhill
from fedjax_lab.evaluation import (
    Evaluation,
    client_metrics,
    combined,
    evaluation_round,
    global_metrics,
    per_client,
    per_client_accuracy,
)
from fedjax_lab.gradients import client_gradient, forget_recorded, mean_recorded, plain_rate, recording
from fedjax_lab.local import (
    ClientOptimizer,
    Work,
    client_weight,
    gradient_oracle,
    local_training,
    masked_mean,
    mean_loss,
    mean_over_client,
    optimizer_of_round,
    partial_work,
)
from fedjax_lab.loops import client_loop
from fedjax_lab.models.base import Model, Variables, add, as_model, difference, initial_variables
from fedjax_lab.nesting import nested
from fedjax_lab.oracle import oracle_run
from fedjax_lab.population import mean_weight, population_mean, population_weights
from fedjax_lab.process import Process
from fedjax_lab.repeating import repeated
from fedjax_lab.result import Result
from fedjax_lab.round import (
    Aggregator,
    ClientOutput,
    Env,
    Lens,
    Oracle,
    Round,
    Tilt,
    Trained,
    Transform,
    chain_tilts,
    compose,
    identity,
    nbytes,
    projection,
    proximal,
    shift,
)
from fedjax_lab.run import Interrupted, run
from fedjax_lab.sampling import (
    Sampler,
    drop_stragglers,
    dropout,
    everyone,
    fixed,
    uniform,
    weighted,
)
from fedjax_lab.simulation import SimulationState, synchronous
from fedjax_lab.states import ClientStates
from fedjax_lab.streaming import streamed
from fedjax_lab.sweep import sweep
from fedjax_lab.sweep_result import SweepResult
from fedjax_lab.transforms.downlink import downlink
from fedjax_lab.transforms.transfers import transfers
from fedjax_lab.transforms.uplink import uplink

__version__ = "0.1.0"
__all__ = [name for name in dir() if not name.startswith("_")]

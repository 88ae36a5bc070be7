"""Round -> Round: what is trained."""

from fedjax_lab.transforms.adapters import adapters
from fedjax_lab.transforms.apfl import apfl
from fedjax_lab.transforms.clusters import clusters
from fedjax_lab.transforms.control_variates import control_variates
from fedjax_lab.transforms.coupling import coupling, in_clusters
from fedjax_lab.transforms.fedpara import fedpara, personal_factors
from fedjax_lab.transforms.gradient_rounds import gradient_rounds, idle_in_even_rounds
from fedjax_lab.transforms.hypernetwork import hypernetwork
from fedjax_lab.transforms.knn import nearest_neighbours
from fedjax_lab.transforms.local_gradients import local_gradients
from fedjax_lab.transforms.meta import meta_sgd, per_fedavg, reptile, with_rates
from fedjax_lab.transforms.mixture import Components, mixture, with_components
from fedjax_lab.transforms.parameter_networks import Hypernetwork, perceptron
from fedjax_lab.transforms.partial_averaging import partial_averaging, periods
from fedjax_lab.transforms.personal import fine_tuning, personal_model
from fedjax_lab.transforms.pfedme import moreau, pfedme
from fedjax_lab.transforms.private import batch_norm, leaves, private, statistics
from fedjax_lab.transforms.pruning import pruning
from fedjax_lab.transforms.reconstruction import reconstruction
from fedjax_lab.transforms.selective import selective
from fedjax_lab.transforms.splitting import split_clusters
from fedjax_lab.transforms.submodels import federated_dropout, width_slices
from fedjax_lab.transforms.tilting import proximal, tilted
from fedjax_lab.transforms.units import hidden_units
from fedjax_lab.transforms.upload_rules import changed_by, cmfl, lag_ps, lag_wk, local_accuracy

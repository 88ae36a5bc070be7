"""Data sets by name, partitioners, generators, and pictures of who has what."""

from fedjax_lab import checks
from fedjax_lab.datasets.assemble import to_split
from fedjax_lab.datasets.collecting import random_clients
from fedjax_lab.datasets.federated import cifar100_federated, emnist_federated, shakespeare_federated
from fedjax_lab.datasets.images import cifar10, cifar100, digits, emnist, fashion_mnist, mnist
from fedjax_lab.datasets.known_optima import (
    clustered_regression,
    point_estimation,
    point_model,
    quadratic_model,
    quadratic_optimum,
    quadratics,
)
from fedjax_lab.datasets.lecture_ratings import insteval
from fedjax_lab.datasets.pachinko_allocation import pachinko
from fedjax_lab.datasets.partition import (
    Partition,
    by_attribute,
    dirichlet,
    dirichlet_sizes,
    iid,
    match,
    power_law,
    shards,
)
from fedjax_lab.datasets.partition_plots import label_counts, plot_partition
from fedjax_lab.datasets.plays import shakespeare_plays
from fedjax_lab.datasets.stackoverflow import (
    HeldOutSplit,
    stackoverflow_federated,
    stackoverflow_tags,
    stackoverflow_words,
)
from fedjax_lab.datasets.synthetic_data import synthetic, synthetic_iid
from fedjax_lab.datasets.tfds_reader import from_tfds
from fedjax_lab.leaf import read_leaf as leaf


def __getattr__(name: str):
    near = checks.nearest(name, [known for known in globals() if not known.startswith("_")])
    raise AttributeError(f"fedjax_lab.datasets has no {name!r}{near}")

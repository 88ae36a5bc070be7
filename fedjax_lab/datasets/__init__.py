from fedjax_lab.datasets.collecting import random_clients
from fedjax_lab.datasets.federated import cifar100_federated, emnist_federated, shakespeare_federated
from fedjax_lab.datasets.stackoverflow import (
    HeldOutSplit,
    stackoverflow_federated,
    stackoverflow_tags,
    stackoverflow_words,
)

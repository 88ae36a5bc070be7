"""Round -> Round: what is trained."""

from fedjax_lab.transforms.control_variates import control_variates
from fedjax_lab.transforms.gradient_rounds import gradient_rounds, idle_in_even_rounds
from fedjax_lab.transforms.private import batch_norm, private, statistics
from fedjax_lab.transforms.tilting import proximal, tilted

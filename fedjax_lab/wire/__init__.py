"""What travels between clients and the server, and what it costs: "optax for the wire".

Links chain: ``fl.uplink(fl.wire.error_feedback(fl.wire.top_k(0.05)), fl.wire.qsgd(8))``.
"""

from fedjax_lab.wire.base import Ctx, Wire, context, identity, round_trip, undo
from fedjax_lab.wire.blocks import grouped, split
from fedjax_lab.wire.chaining import chain
from fedjax_lab.wire.coding import elias, golomb
from fedjax_lab.wire.eden import drive, eden, lloyd_max
from fedjax_lab.wire.feedback import error_feedback, momentum_correction
from fedjax_lab.wire.fixed import fixed_point
from fedjax_lab.wire.lowrank import factorize, low_rank, power_sgd
from fedjax_lab.wire.noise import clip, gaussian
from fedjax_lab.wire.payload import deserialize, length, serialize
from fedjax_lab.wire.quantize import natural, qsgd, quantize, terngrad
from fedjax_lab.wire.rotation import dense_rotation, hadamard, kashin
from fedjax_lab.wire.seeds import own_seed
from fedjax_lab.wire.signs import majority_vote, one_bit, sign
from fedjax_lab.wire.sketch import count_mean_sketch, count_sketch, fetch_sgd
from fedjax_lab.wire.sparsify import rand_mask, random_k, threshold, top_k

"""What travels between clients and the server, and what it costs: "optax for the wire".

Links chain: ``fl.uplink(fl.wire.error_feedback(fl.wire.top_k(0.05)), fl.wire.qsgd(8))``.

=========================  ==========================================================================================
few entries                top_k, random_k, rand_mask, threshold
few bits an entry          quantize, qsgd, natural, terngrad, sign, majority_vote, one_bit, lloyd_max, eden, drive
even spread, before those  hadamard, kashin, dense_rotation
low rank                   low_rank, factorize, power_sgd
sketches                   count_sketch, count_mean_sketch, fetch_sgd
memories around a link     error_feedback, momentum_correction
parts of a model           grouped, split
shorter words, put last    elias, golomb
bounds, noise, exact sums  clip, gaussian, fixed_point
=========================  ==========================================================================================

``round_trip(link, x)`` shows what arrives and how many bytes it took. Write your own link as ``Wire(encode, open,
decode, ...)``, or from two functions of one vector as ``wire.vectors.on_vector`` does.
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

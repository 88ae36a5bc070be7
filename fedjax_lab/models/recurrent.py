"""Language models: an embedding, layers of LSTM, scores of the next character or word."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lab import checks
from fedjax_lab.models import losses
from fedjax_lab.models.base import Model
from fedjax_lab.models.flax_adapter import from_flax
from fedjax_lab.models.functional import features

PyTree = Any


class LSTM(nn.Module):
    """One layer over a whole sequence: ``float[batch, time, d] -> float[batch, time, units]``.

    The inputs' part of all gates is one matrix product before the loop, which leaves one product a
    step. The forget gate starts with a bias of 1 (as in Keras and Haiku, hence TFF and FedJAX).
    Gates lie in the order input, forget, cell, output.
    """

    units: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gates = nn.Dense(4 * self.units, bias_init=_forget_one, name="input")(x)
        recurrent = self.param("recurrent", nn.initializers.orthogonal(), (self.units, 4 * self.units), jnp.float32)

        return jnp.swapaxes(hidden_states(jnp.swapaxes(gates, 0, 1), recurrent), 0, 1)


@jax.custom_jvp
def hidden_states(gates: jax.Array, recurrent: jax.Array) -> jax.Array:
    """What an LSTM's units say at every step, starting from zeros.

    Its derivative is written out, so that reverse mode computes the gradient of ``recurrent`` after the loop, as one
    matrix product over all steps and examples: half the time of adding it up in the loop, step by step. Forward mode
    and higher derivatives work as usual.

    Args:
      gates: ``float[time, batch, 4 * units]``, the inputs' part of the gates, in the order of :class:`LSTM`.
      recurrent: ``float[units, 4 * units]``.

    Returns:
      ``float[time, batch, units]``.
    """
    return _run(gates, recurrent, lambda *values: ())[0]


def _run(gates: jax.Array, recurrent: jax.Array, keep: Callable) -> tuple[jax.Array, PyTree]:
    """The hidden states, and what to ``keep`` of each step's values."""

    def step(carry, gates):
        cell, hidden = carry
        i, f, g, o = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
        i, f, g, o = nn.sigmoid(i), nn.sigmoid(f), jnp.tanh(g), nn.sigmoid(o)
        new = f * cell + i * g
        out = jnp.tanh(new)
        return (new, o * out), (o * out, keep(i, f, g, o, cell, out))

    start = jnp.zeros((gates.shape[1], recurrent.shape[0]), gates.dtype)
    return jax.lax.scan(step, (start, start), gates)[1]


def _slopes(i, f, g, o, cell, out):
    """A step's derivatives: of the new cell by the old and by each gate's argument; of the output by both."""
    of_cell = (f, g * i * (1 - i), cell * f * (1 - f), i * (1 - g * g))
    return of_cell, (o * (1 - out * out), out * o * (1 - o))


@hidden_states.defjvp
def _derivative(primals, tangents):
    (gates, recurrent), (gates_dot, recurrent_dot) = primals, tangents
    hidden, slopes = _run(gates, recurrent, _slopes)
    # The one place where recurrent_dot enters: its transpose is the product after the loop.
    before = jnp.concatenate([jnp.zeros_like(hidden[:1]), hidden[:-1]])
    gates_dot += (before.reshape(-1, before.shape[-1]) @ recurrent_dot).reshape(gates.shape)
    # Contracted along its rows, so that the loop of the reverse mode reads it in order.
    turned = recurrent.T

    def step(carry, row):
        cell_dot, hidden_dot = carry
        gates_dot, ((by_cell, by_i, by_f, by_g), (by_new, by_o)) = row
        through = jax.lax.dot_general(hidden_dot, turned, (((1,), (1,)), ((), ())))
        i, f, g, o = jnp.split(gates_dot + through, 4, axis=-1)
        cell_dot = by_cell * cell_dot + by_i * i + by_f * f + by_g * g
        hidden_dot = by_new * cell_dot + by_o * o
        return (cell_dot, hidden_dot), hidden_dot

    start = jnp.zeros_like(hidden[0])
    return hidden, jax.lax.scan(step, (start, start), (gates_dot, slopes))[1]


def _forget_one(key, shape, dtype=jnp.float32):
    """Biases of the four gates: zero, and one for the forget gate."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)


class LanguageModel(nn.Module):
    """Scores of each next token, ``int[batch, time] -> float[batch, time, vocabulary]``."""

    vocabulary: int
    embed: int
    units: int
    layers: int
    projection: int | None = None
    last_only: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.embed, name="embed")(tokens)
        for i in range(self.layers):
            x = LSTM(self.units, name=f"lstm_{i}")(x)
            if self.projection is not None:
                x = nn.Dense(self.projection, name=f"projection_{i}")(x)
        x = x[:, -1] if self.last_only else x
        return nn.Dense(self.vocabulary, name="output")(x)


def char_lstm(
    vocab_size: int = 90,
    embed: int = 8,
    hidden: int = 256,
    layers: int = 2,
    *,
    last_only: bool = False,
) -> Model:
    """The character LSTM of Shakespeare (McMahan et al. 2017, section 3; Reddi et al. 2021).

    Each character is embedded in 8 dimensions; two layers of 256 units; scores of the next one.
    Parameters: 820,522 for the 90 symbols of TFF and FedJAX (86 characters, padding, beginning,
    end, unknown). FedJAX puts a tanh after each layer, TFF and this model do not. McMahan et al.
    report 866,578, which no vocabulary gives with these layers.

    ``x, y: int[batch, time]``, 0 is padding; the loss is the mean over a sequence's real tokens.

    Args:
      vocab_size: symbols, the special ones included; labels are ``0..vocab_size-1``.
      embed: dimensions of a character.
      hidden: units of each layer.
      layers: layers of LSTM.
      last_only: predict only the character after the last, ``y: int[batch]``, as LEAF does.
    """
    return _language_model(LanguageModel(vocab_size, embed, hidden, layers, last_only=last_only))


def word_lstm(vocab_size: int = 10_004, embed: int = 96, hidden: int = 670, layers: int = 1) -> Model:
    """The next-word LSTM of Stack Overflow (Reddi et al. 2021): 4,050,748 parameters.

    10,000 words, padding, beginning, end and unknown; one layer of 670 units; each layer is
    projected back to the embedding's 96 dimensions. ``x, y: int[batch, time]`` as for
    :func:`char_lstm`.
    """
    return _language_model(LanguageModel(vocab_size, embed, hidden, layers, projection=embed))


def _language_model(module: LanguageModel) -> Model:
    for name in ("vocabulary", "embed", "units", "layers"):
        checks.positive(getattr(module, name), _ARGUMENTS.get(name, name), integer=True)
    made = from_flax(
        module,
        jax.ShapeDtypeStruct((1, 1), jnp.int32),
        loss=losses.cross_entropy if module.last_only else losses.sequence_cross_entropy,
        num_classes=module.vocabulary,
        inputs=_tokens,
    )
    # The embedding of any other token is NaN.
    check = lambda data: checks.values_in_range(data, "x", 0, module.vocabulary - 1, "token", "the vocabulary")
    return made._replace(check=check)


_ARGUMENTS: Mapping[str, str] = {"vocabulary": "vocab_size", "units": "hidden"}


def _tokens(batch) -> jax.Array:
    x = features(batch)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim != 2:
        raise ValueError(
            f'a language model needs tokens "x" as integers [examples, time]; got {x.dtype}{list(x.shape)}'
        )
    return x.astype(jnp.int32)

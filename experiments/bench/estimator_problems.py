"""Three of the standard problems of estimators.py, small, fixed, and without a download."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rivals

from lfg_jax import data, tap
from lfg_jax.tangents.distributions import hadamard

PyTree = Any


class Problem(NamedTuple):
  """A network with its losses, and how its gradient is estimated there.

  Attributes:
    title: in words.
    params: at initialisation.
    losses: `(params, *args) -> losses`, examples first.
    batch: `number -> args`.
    estimators: `(params, key) -> {(family, K): estimator}`, as `lfg_jax.compare` takes them.
  """

  title: str
  params: PyTree
  losses: Callable
  batch: Callable[[int], tuple]
  estimators: Callable[[PyTree, jax.Array], dict[tuple[str, int], Any]]

  def trained(self, steps: int) -> PyTree:
    """The parameters after some steps of Adam along the exact gradient."""
    optimizer = optax.adam(3e-3)
    mean = lambda params, args: objective(self.losses)(params, *args)

    @jax.jit
    def step(params: PyTree, state: Any, args: tuple) -> tuple[PyTree, Any]:
      updates, state = optimizer.update(jax.grad(mean)(params, args), state)
      return optax.apply_updates(params, updates), state

    params, state = self.params, optimizer.init(self.params)
    for number in range(1, steps + 1):
      params, state = step(params, state, self.batch(number))
    return params


def objective(losses: Callable) -> Callable[..., jax.Array]:
  """The sum of all losses, divided by the number of examples."""

  def mean(*args: Any) -> jax.Array:
    leaves = jax.tree.leaves(losses(*args))
    return sum(leaf.sum() for leaf in leaves) / leaves[0].shape[0]

  return mean


def general(losses: Callable, last: str, names: tuple[str, ...]) -> dict[tuple[str, int], Any]:
  """Estimators for any function with taps, of which `last` is the one nearest to the losses."""
  mean, alone = objective(losses), {'joint': False, 'distribution': hadamard}
  before = [name for name in names if name != last]
  return {
    **{
      ('weights', K): {'perturb': 'weights', 'distribution': hadamard, 'num_tangents': K}
      for K in (1, 16)
    },
    ('weights, differences (SPSA)', 1): rivals.two_sided(mean),
    ('weights, differences, seed (MeZO)', 1): rivals.seeded(mean),
    ('weights, evolution strategies', 8): rivals.antithetic(mean, 8),
    **{
      ('activities at once (Ren et al.)', K): {'distribution': hadamard, 'num_tangents': K}
      for K in (1, 8)
    },
    **{('activities one by one', K): {**alone, 'num_tangents': K} for K in (1, 8)},
    **{
      ('one by one, last exact', K): {**alone, 'num_tangents': K, 'taps': before}
      for K in (1, 8, 32)
    },
    ('one by one, projection', 8): {**alone, 'num_tangents': 8, 'combine': 'projection'},
  }


def _dense(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
  return jax.random.normal(key, (inputs, outputs)) / inputs**0.5


def digits(batch: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  """`number -> (image, label)`: a random batch of the digits."""
  train = data.load('digits').train

  def of(number: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(number).integers(0, train.examples, batch)
    return train.image_NxHxWxC[ids], train.label_N[ids].astype(np.int32)

  return of


def mlp(width: int = 64, batch: int = 32) -> Problem:
  """A perceptron with two hidden layers on the digits."""
  images, names = digits(batch), ('first', 'second', 'out')
  sizes = dict(zip(names, ((64, width), (width, width), (width, 10)), strict=True))

  def init(seed: int) -> PyTree:
    keys = jax.random.split(jax.random.key(seed), 3)
    return {name: _dense(key, *sizes[name]) for name, key in zip(names, keys, strict=True)}

  def of(number: int) -> tuple[np.ndarray, np.ndarray]:
    image, label = images(number)
    return image.reshape(batch, -1).astype(np.float32) / 255, label

  def logits(params: PyTree, x: jax.Array, back: PyTree) -> jax.Array:
    for name in names:
      z = rivals.linear(x, params[name], back[name]) if back else x @ params[name]
      z = tap(z, name)
      x = jnp.tanh(z)
    return z

  def losses(params: PyTree, x: jax.Array, y: jax.Array, back: PyTree = None) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x, back), y)

  def with_error(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = logits(params, x, None)
    losses = optax.softmax_cross_entropy_with_integer_labels(z, y)
    return losses, jax.nn.softmax(z) - jax.nn.one_hot(y, 10)

  def estimators(params: PyTree, key: jax.Array) -> dict[tuple[str, int], Any]:
    seen, hidden = rivals.mirror(params, key, 1000), names[:-1]
    matrices = {name: _dense(key, 10, width) for name in hidden} | {'out': jnp.eye(10)}
    mirrored = lambda K: rivals.mirrored(
      losses, seen, hidden, distribution=hadamard, num_tangents=K, taps=hidden
    )
    return {
      **general(losses, 'out', names),
      **{('last exact, weight mirror as a control variate', K): mirrored(K) for K in (1, 8)},
      ('feedback alignment', 1): rivals.feedback_alignment(losses, init(1)),
      ('direct feedback alignment', 1): rivals.direct_feedback(with_error, matrices),
    }

  return Problem('MLP on digits', init(0), losses, of, estimators)


def transformer(width: int = 32, length: int = 32, batch: int = 8) -> Problem:
  """A causal transformer of two blocks and one head of attention that predicts characters."""
  import pydoc_data.topics

  text = np.frombuffer(inspect.getsource(pydoc_data.topics).encode('ascii', 'replace'), np.uint8)
  alphabet, code = np.unique(text, return_inverse=True)
  parts = {'qkv': (width, 3 * width), 'mixed': (width, width)}
  parts |= {'hidden': (width, 2 * width), 'wide': (2 * width, width)}
  names = tuple(f'{part}{block}' for block in (0, 1) for part in parts)
  keys = jax.random.split(jax.random.key(0), len(names) + 3)
  params = {
    name: _dense(key, *parts[name[:-1]]) for name, key in zip(names, keys[:-3], strict=True)
  }
  params |= {'embedding': jax.random.normal(keys[-3], (len(alphabet), width)) / 2}
  params |= {'places': jax.random.normal(keys[-2], (length, width)) / 2}
  params |= {'logits': _dense(keys[-1], width, len(alphabet))}

  def of(number: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.random.default_rng(number).integers(0, len(code) - length - 1, batch)
    ids = starts[:, None] + np.arange(length)
    return code[ids].astype(np.int32), code[ids + 1].astype(np.int32)

  def norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)

  def losses(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    h = params['embedding'][x] + params['places']
    for block in (0, 1):
      # After the last attention, a token influences its own loss only.
      layer = lambda x, name, axes=1, b=block: tap(
        x @ params[f'{name}{b}'], f'{name}{b}', local_axes=axes
      )
      q, k, v = jnp.split(layer(norm(h), 'qkv'), 3, axis=-1)
      scores = jnp.einsum('btd,bsd->bts', q, k) / width**0.5
      scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
      local = 1 + block
      h += layer(jnp.einsum('bts,bsd->btd', jax.nn.softmax(scores), v), 'mixed', local)
      h += layer(jax.nn.relu(layer(norm(h), 'hidden', local)), 'wide', local)
    z = tap(norm(h) @ params['logits'], 'logits', local_axes=2)
    return optax.softmax_cross_entropy_with_integer_labels(z, y) / length

  every = (*names, 'logits')
  of_all = lambda *_: general(losses, 'logits', every)
  return Problem('Causal transformer on text', params, losses, of, of_all)


def recurrent(width: int = 32, symbols: int = 8, copied: int = 4, batch: int = 16) -> Problem:
  """A GRU that reads four symbols, waits for four steps, and repeats them."""
  steps, inputs = 3 * copied, symbols + 2  # a blank, and the sign to begin
  keys = jax.random.split(jax.random.key(0), 3)
  params = {
    'gates': _dense(keys[0], inputs + width, 2 * width),
    'candidate': _dense(keys[1], inputs + width, width),
    'logits': _dense(keys[2], width, symbols),
  }

  def of(number: int) -> tuple[np.ndarray, np.ndarray]:
    word = np.random.default_rng(number).integers(0, symbols, (batch, copied)).astype(np.int32)
    x, y = np.full((batch, steps), symbols, np.int32), np.full((batch, steps), -1, np.int32)
    x[:, :copied], y[:, -copied:], x[:, -copied] = word, word, symbols + 1
    return x, y

  def cell(params: PyTree, h: jax.Array, x: jax.Array) -> jax.Array:
    x = jax.nn.one_hot(x, inputs)
    z = tap(jnp.concatenate([x, h], -1) @ params['gates'], 'gates')
    keep, reset = jnp.split(jax.nn.sigmoid(z), 2, axis=-1)
    new = tap(jnp.concatenate([x, reset * h], -1) @ params['candidate'], 'candidate')
    return keep * h + (1 - keep) * jnp.tanh(new)

  def loss_at(params: PyTree, h: jax.Array, y: jax.Array) -> jax.Array:
    z = tap(h @ params['logits'], 'logits')
    each = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(y, 0))
    return jnp.where(y < 0, 0, each) / copied

  def losses(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    def step(h: jax.Array, inputs: tuple) -> tuple[jax.Array, jax.Array]:
      h = cell(params, h, inputs[0])
      return h, loss_at(params, h, inputs[1])

    return jax.lax.scan(step, jnp.zeros((batch, width)), (x.T, y.T))[1].sum(0)

  def estimators(params: PyTree, key: jax.Array) -> dict[tuple[str, int], Any]:
    online = rivals.uoro(cell, loss_at, lambda params: jnp.zeros(width))
    found = general(losses, 'logits', ('gates', 'candidate', 'logits'))
    return {**found, ('UORO', 1): online}

  return Problem('GRU that copies', params, losses, of, estimators)

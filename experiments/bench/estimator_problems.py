"""The four standard problems of estimators.py, small, fixed, and without a download."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rivals

from lfg_jax import data, tap
from lfg_jax.data.datasets import Batch
from lfg_jax.estimators.tangents import hadamard
from lfg_jax.losses.row_losses import cross_entropy
from lfg_jax.losses.staged import Place, own
from lfg_jax.losses.targets import Targets
from lfg_jax.training import algorithms, configs

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
  mean, alone = objective(losses), {'separate': True, 'law': hadamard}
  before = [name for name in names if name != last]
  return {
    **{('weights', K): {'perturb': 'weights', 'law': hadamard, 'passes': K} for K in (1, 16)},
    ('weights, differences (SPSA)', 1): rivals.two_sided(mean),
    ('weights, differences, seed (MeZO)', 1): rivals.seeded(mean),
    ('weights, evolution strategies', 8): rivals.antithetic(mean, 8),
    **{('activities at once (Ren et al.)', K): {'law': hadamard, 'passes': K} for K in (1, 8)},
    **{('activities one by one', K): {**alone, 'passes': K} for K in (1, 8)},
    **{('one by one, last exact', K): {**alone, 'passes': K, 'taps': before} for K in (1, 8, 32)},
    ('one by one, projection', 8): {**alone, 'passes': 8, 'combination': 'projection'},
  }


def _dense(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
  return jax.random.normal(key, (inputs, outputs)) / inputs**0.5


def _digits(batch: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  train = data.load('digits').train

  def of(number: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(number).integers(0, train.examples, batch)
    return train.image_NxHxWxC[ids], train.label_N[ids].astype(np.int32)

  return of


def mlp(width: int = 64, batch: int = 32) -> Problem:
  """A perceptron with two hidden layers on the digits."""
  images, names = _digits(batch), ('first', 'second', 'out')
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
    guessed = lambda K: rivals.mirrored(losses, seen, hidden, law=hadamard, passes=K, taps=hidden)
    return {
      **general(losses, 'out', names),
      **{('last exact, guess of a weight mirror', K): guessed(K) for K in (1, 8)},
      ('feedback alignment', 1): rivals.feedback_alignment(losses, init(1)),
      ('direct feedback alignment', 1): rivals.direct_feedback(with_error, matrices),
    }

  return Problem('MLP on digits', init(0), losses, of, estimators)


def mixer(batch: int = 32) -> Problem:
  """The LocalMixer S/2/4 with a loss for every block, patch and group, on the digits.

  No gradient crosses blocks. Estimators are rules of the trainer; the exact gradient is LG-BP's.
  """
  images, dataset = _digits(batch), data.load('digits')

  def algorithm(rule: str, **fields: Any) -> algorithms.Algorithm:
    config = configs.base()
    config.model.size, config.model.channels, config.algorithm = 'S/2/4', 32, rule
    config.estimator.update({'chunk': 0, **fields})
    return algorithms.make(config, dataset)

  exact = algorithm('LG-BP')
  model, cut = exact.made_of.model, exact.made_of.options.cut

  def losses(params: PyTree, examples: Batch) -> list[jax.Array]:
    x, ones, found = model.prepare(examples.image), jnp.ones(batch), []
    targets, variables = Targets(examples.label, ones), {'params': params}
    for stack in model.stacks:

      def body(x: jax.Array, of_block: Any, stack: Any = stack) -> tuple[jax.Array, jax.Array]:
        at = Place('last', cut, last=True)
        return stack.block(of_block, jax.lax.stop_gradient(x), targets, at)[:2]

      inside = own(variables, stack.name)
      x, local = jax.lax.scan(body, x, inside) if stack.is_stacked else body(x, inside)
      found.append(jnp.moveaxis(local, 0, 1) if stack.is_stacked else local)
    x = jax.lax.stop_gradient(x)
    return [*found, cross_entropy(model.read_out(own(variables, 'readout'), x, ones)[0], targets)]

  def of(number: int) -> tuple[Batch]:
    image, label = images(number)
    return (Batch(image, label, np.full(batch, 1 / batch, np.float32)),)

  def rule(params: PyTree, key: jax.Array, name: str, **fields: Any) -> rivals.Estimator:
    made = algorithm(name, **fields)
    rest = {kind: tree for kind, tree in made.init(key).items() if kind != 'params'}
    if 'guess' in rest:  # learned here for a while, as it would be beside the parameters
      learn = jax.jit(
        lambda rest, key, examples: made.advance(
          rest, params, made.gradient({'params': params, **rest}, key, examples)[1]
        )
      )
      for number in range(300):
        rest = learn(rest, jax.random.fold_in(key, number), of(number)[0])

    def run(params: PyTree, examples: Batch, *, key: jax.Array) -> tuple[jax.Array, PyTree]:
      gradient, aux = made.gradient({'params': params, **rest}, key, examples)
      return aux['loss'], gradient

    return run

  def estimators(params: PyTree, key: jax.Array) -> dict[tuple[str, int], Any]:
    made, alone = functools.partial(rule, params, key), {'guess': 'none', 'last_tap': 'perturbed'}
    return {
      **{('weights', K): made('LG-FG-W', passes=K) for K in (1, 16)},
      ('activities, one-sided differences', 1): made('LG-FD-A'),
      **{('activities at once (Ren et al.)', K): made('LG-FG-A-paper', passes=K) for K in (1, 8)},
      **{('activities one by one', K): made('LG-FG-A', passes=K, **alone) for K in (1, 8)},
      **{('one by one, last exact', K): made('LG-FG-A', passes=K, guess='none') for K in (1, 8)},
      **{
        ('last exact, learned guesses', K): made('LG-FG-A', passes=K, guess='all') for K in (1, 8)
      },
      ('feedback alignment', 1): made('LG-FA'),
    }

  params = exact.init(jax.random.key(0))['params']
  return Problem('LocalMixer on digits, local losses', params, losses, of, estimators)


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

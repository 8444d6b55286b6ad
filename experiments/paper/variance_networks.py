"""The parts `mlp`, `mixer` and `num_tangents` of variance.py: networks, layer by layer."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from lfg_jax import data, forward_grad, mark, value_and_activity_grad
from lfg_jax.tangents import variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS
from lfg_jax.training import configs
from lfg_jax.training.command_line import Options
from lfg_jax.training.cost import timing
from lfg_jax.training.rules import algorithms

Row = dict[str, Any]
BATCH = 4  # images of the mixer's parts
PASSES = (1, 2, 4, 8, 16, 32)


def _by_layer(estimate: Callable, truth: Any, draws: int, at_once: int) -> Iterator[Row]:
  """A row for every kernel: its error (also relative to |truth|²), cosine and bias."""
  kernels = lambda tree: {
    '/'.join(path[:-1]): leaf for path, leaf in flatten_dict(tree).items() if path[-1] == 'kernel'
  }
  truth = {name: leaf for name, leaf in kernels(truth).items() if float(jnp.abs(leaf).max()) > 0}

  def statistics_of(key: jax.Array) -> dict:
    grads = {name: leaf for name, leaf in kernels(estimate(key)).items() if name in truth}
    norm = jnp.linalg.norm
    error = {name: ((g - truth[name]) ** 2).mean() for name, g in grads.items()}
    cosine = {
      name: jnp.vdot(g, truth[name]) / (norm(g) * norm(truth[name])) for name, g in grads.items()
    }
    return {'grads': grads, 'error': error, 'cosine': cosine}

  zeros = dict.fromkeys(truth, jnp.zeros(()))
  measured = variance.measure(
    statistics_of,
    {'grads': truth, 'error': zeros, 'cosine': zeros},
    jax.random.key(3),
    draws,
    at_once=at_once,
  )
  for name, leaf in truth.items():
    own = measured._replace(
      mean=measured.mean['grads'][name], variance=measured.variance['grads'][name]
    )
    yield {
      'layer': name,
      'p': leaf.shape[-2],
      'q': leaf.shape[-1],
      'bias_z': float(own.bias_z(leaf)),
      'measured': float(measured.mean['error'][name]),
      'standard_error': float((measured.variance['error'][name] / measured.draws) ** 0.5),
      'relative_error': float(measured.mean['error'][name] / (leaf**2).mean()),
      'cosine': float(measured.mean['cosine'][name]),
    }


class MLP(nn.Module):
  """A network of three linear layers."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.tanh(nn.Dense(32, name='first')(x))
    return nn.Dense(10, name='third')(nn.tanh(nn.Dense(32, name='second')(x)))


def _predicted_mlp(params: dict, x: jax.Array, y: jax.Array) -> Callable[..., dict[str, float]]:
  """Makes a function that predicts the squared error per entry of every kernel.

  It uses the norms of the gradients at the weights and at the activities.
  """
  layers = ('first', 'second', 'third')

  def forward(shift: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    inputs = [x]
    for layer, s in zip(layers, shift, strict=True):
      z = inputs[-1] @ params[layer]['kernel'] + params[layer]['bias'] + s
      inputs.append(nn.tanh(z))
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean(), inputs

  widths = [params[layer]['bias'].size for layer in layers]
  signals, inputs = jax.grad(forward, has_aux=True)([jnp.zeros((len(x), d)) for d in widths])
  weights = [
    jnp.concatenate([x.T @ s, s.sum(0)[None]]) for x, s in zip(inputs, signals, strict=False)
  ]

  def predict(name: str, distribution: str, num_tangents: int, joint: bool) -> dict[str, float]:
    tensors, axes = (weights, (0, 1)) if name == 'weight' else (signals, 1)
    dims = [w.size for w in weights] if name == 'weight' else widths
    errors = variance.predicted_taps(
      DISTRIBUTIONS[distribution],
      [num_tangents] * 3,
      dims,
      [(t**2).sum(axes) for t in tensors],
      joint=joint,
    )
    if name == 'weight':
      return {layer: float(e / d) for layer, e, d in zip(layers, errors, dims, strict=True)}
    # The error of x sᵀ is |x|² times that of the signal s.
    return {
      layer: float((e * (x**2).sum(1)).sum() / params[layer]['kernel'].size)
      for layer, e, x in zip(layers, errors, inputs, strict=False)
    }

  return predict


def mlp(options: Options) -> Iterator[Row]:
  """Rows for an MLP on a batch of 32 digits.

  'weight' is `forward_grad` of the mean loss. 'activity' is `value_and_activity_grad` with marked
  layers.
  """
  del options
  train = data.load('digits').train
  x, y = (
    jnp.asarray(train.image_NxHxWxC[:32]).reshape(32, -1) / 255,
    jnp.asarray(train.label_N[:32]),
  )
  variables = jax.jit(MLP().init)(jax.random.key(0), x)
  losses = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda params: losses(MLP().apply({'params': params}, x), y).mean()
  truth = jax.jit(jax.grad(loss))(variables['params'])
  predict = _predicted_mlp(variables['params'], x, y)

  def activity(distribution: str, num_tangents: int, joint: bool) -> Callable:
    per_example = lambda params: losses(mark(MLP(), nn.Dense).apply({'params': params}, x), y)
    step = value_and_activity_grad(
      per_example, distribution=DISTRIBUTIONS[distribution], num_tangents=num_tangents, joint=joint
    )
    return lambda key: step(jax.lax.optimization_barrier(variables['params']), key=key)[1]

  def weight(distribution: str, num_tangents: int, joint: bool) -> Callable:
    del joint
    run = forward_grad(loss, distribution=DISTRIBUTIONS[distribution], num_tangents=num_tangents)
    return lambda key: run(jax.lax.optimization_barrier(variables['params']), key=key)

  for name, make, joint, orthogonal in (
    ('weight', weight, True, 'haar'),
    ('activity', activity, True, 'hadamard'),
    ('activity', activity, False, 'hadamard'),
  ):
    for distribution in ('normal', 'rademacher', orthogonal):
      for num_tangents in (1, 4, 32):
        estimate = make(distribution, num_tangents, joint)
        predicted = predict(name, distribution, num_tangents, joint)
        ms = timing.one_ms(functools.partial(jax.jit(estimate), jax.random.key(0)))
        for row in _by_layer(estimate, truth, 400, 20):
          yield {
            'estimator': name,
            'distribution': distribution,
            'num_tangents': num_tangents,
            'taps': 'joint' if joint else 'separate',
            'sharing': 'shared' if name == 'weight' else 'independent',
            'batch': 32,
            **row,
            'predicted': predicted[row['layer']],
            'ms': ms,
          }


class Mixer:
  """M/8/16 on a batch of CIFAR-10, after some steps of LG-BP.

  Without these steps, its heads and therefore its gradients would be zero.
  """

  def __init__(self, data_dir: str | None) -> None:
    self.config = configs.base()
    self.dataset = data.load('cifar10', data_dir=data_dir)
    split = self.dataset.train
    batch = lambda n, size: data.Batch(
      jnp.asarray(split.image_NxHxWxC[n : n + size]),
      jnp.asarray(split.label_N[n : n + size]),
      jnp.full(size, 1 / size),
    )
    self.variables = self.make('LG-BP').init(jax.random.key(0))
    optimizer = optax.adam(1e-3)
    gradient = self.make('LG-BP').gradient

    @jax.jit
    def step(variables: dict, state: Any, batch: data.Batch) -> tuple[dict, Any]:
      updates, state = optimizer.update(gradient(variables, jax.random.key(0), batch)[0], state)
      return {**variables, 'params': optax.apply_updates(variables['params'], updates)}, state

    state = optimizer.init(self.variables['params'])
    for n in range(40):
      self.variables, state = step(self.variables, state, batch(64 * n, 64))
    self.batch = batch(10_000, BATCH)

  def make(self, name: str, **options: Any) -> algorithms.Algorithm:
    """The algorithm with this name, and with changed fields of estimator and losses."""
    config = self.config.copy_and_resolve_references()
    config.algorithm = name
    for field, value in options.items():
      setattr(config.losses if field in config.losses else config.estimator, field, value)
    return algorithms.make(config, self.dataset)

  def estimate(self, name: str, **options: Any) -> Callable:
    """`key -> gradient` of the algorithm with this name."""
    gradient = self.make(name, **options).gradient

    def run(key: jax.Array) -> Any:
      # The barrier prevents constant folding: time and compilation are those of a training step.
      variables, batch = jax.lax.optimization_barrier((self.variables, self.batch))
      return gradient(variables, key, batch)[0]

    return run


CUTS = {
  'block': (False, False),
  'block+patch': (True, False),
  'block+group': (False, True),
  'all': (True, True),
}


def _mixer_runs() -> Iterator[tuple[str, str, dict]]:
  """(algorithm, cut, options)."""
  for distribution in ('normal', 'rademacher'):
    for name in ('FG-W', 'FG-A'):
      yield name, 'none', {'distribution': distribution}
    for name in ('LG-FG-W', 'LG-FG-A'):
      for cut, (patch, group) in CUTS.items():
        if distribution == 'rademacher' or cut == 'all':
          yield name, cut, {'distribution': distribution, 'patch': patch, 'group': group}
  for distribution, joint in (('hadamard', False), ('rademacher', True), ('hadamard', True)):
    for num_tangents in PASSES[joint:]:  # one tangent is the same for both distributions
      fields = {'distribution': distribution, 'joint': joint, 'num_tangents': num_tangents}
      yield 'LG-FG-A', 'all', fields


def mixer(options: Options) -> Iterator[Row]:
  """Rows for every algorithm and cut, then for numbers of tangents."""
  model = Mixer(options.data_dir)
  truths: dict[str, Any] = {}
  for name, cut, fields in _mixer_runs():
    target = 'LG-BP' if name.startswith('LG') else 'BP'
    if target not in truths:
      truths[target] = jax.jit(model.estimate(target))(jax.random.key(0))
    estimate = model.estimate(name, **fields)
    ms = timing.one_ms(functools.partial(jax.jit(estimate), jax.random.key(0)))
    for row in _by_layer(estimate, truths[target], options.draws, 1):
      if not row['layer'].startswith('readout') and not row['layer'].endswith('head'):
        yield {
          'estimator': name,
          'cut': cut,
          'distribution': fields['distribution'],
          'num_tangents': fields.get('num_tangents', 1),
          'taps': 'joint' if fields.get('joint', True) else 'separate',
          'sharing': 'paper',
          'batch': BATCH,
          **row,
          'ms': ms,
        }


def num_tangents(options: Options) -> Iterator[Row]:
  """Rows with time and temporaries of LG-FG-A; runs take turns, and the fastest counts."""
  model = Mixer(options.data_dir)
  cases = [
    (distribution, chunk, K)
    for distribution in ('rademacher', 'hadamard')
    for chunk in (0, 4)
    for K in PASSES
    if chunk < K
  ]
  programs = {}
  for distribution, chunk, K in cases:
    step = model.make('LG-FG-A', distribution=distribution, num_tangents=K, chunk=chunk)
    programs[distribution, chunk, K] = (
      jax.jit(step.gradient).lower(model.variables, jax.random.key(0), model.batch).compile()
    )
  calls = {
    case: lambda run=run: run(model.variables, jax.random.key(0), model.batch)
    for case, run in programs.items()
  }
  best = {case: 1000 * min(seconds) for case, seconds in timing.interleaved(calls, 5).items()}
  for (distribution, chunk, K), run in programs.items():
    yield {
      'estimator': 'LG-FG-A',
      'distribution': distribution,
      'num_tangents': K,
      'chunk': chunk,
      'batch': BATCH,
      'ms': best[distribution, chunk, K],
      'relative_to_one_pass': best[distribution, chunk, K] / best[distribution, 0, 1],
      'allowed': (1 + 2 * K) / 3,
      'temporaries_bytes': run.memory_analysis().temp_size_in_bytes,
    }

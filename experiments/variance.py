"""Measures the variance of forward gradients: against theory, and on real images layer by layer.

    python experiments/variance.py --out=DIR [--parts=table1,laws,mlp,mixer,passes] [--data_dir=DIR] [--draws=N]

| part | what |
|---|---|
| table1 | one linear layer: all rows of Table 1, p, q = 2, 8, 64, batches of 1, 16, 128, normal and Rademacher |
| laws | one linear layer: all laws, 1 to 8 passes |
| mlp | an MLP on the embedded digits, layer by layer, estimators of modules that the library does not know |
| mixer | M/8/16 on CIFAR-10 (JPEG quality 75, see prepare_data.py), layer by layer: algorithms, cuts, laws, passes |
| passes | the time and memory of K passes, all at once and in chunks, on M/8/16 |

DIR gets for every part PART.json, a list of rows, and PART.png; and table.md.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import variance_figures as figures
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure

from lfg_jax import algorithms, configs, data, linear_layer, run_log, variance
from lfg_jax.forward_grad import forward_grad
from lfg_jax.modules import value_and_activity_grad
from lfg_jax.passes import Sampling
from lfg_jax.tangents import LAWS

Row = dict[str, Any]
BATCH = 4    # images of the mixer's parts
PASSES = (1, 2, 4, 8, 16, 32)


def main(arguments: list[str]) -> None:
  """Runs the parts."""
  parser = configs.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--parts', default=','.join(PARTS), help=f'default: {",".join(PARTS)}')
  parser.add_argument('--data_dir', help='of TFDS')
  parser.add_argument('--draws', type=int, default=16, help='of every estimate on images; default: 16')
  options = parser.parse_args(arguments)
  for part in options.parts.split(','):
    if part not in PARTS:
      raise configs.UserError(f'--parts has {part!r}; allowed: {", ".join(PARTS)}')
  options.out.mkdir(parents=True, exist_ok=True)
  for part in options.parts.split(','):
    rows = []
    for row in PARTS[part][0](options):
      rows.append(row)
      print({name: _short(value) for name, value in row.items()}, flush=True)
    run_log.write_atomically(options.out / f'{part}.json', '[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    figure = Figure(figsize=(9, 5), layout='constrained')
    PARTS[part][1](figure, rows)
    figure.savefig(options.out / f'{part}.png', dpi=100)
  _write_table(options.out)


def _short(value: Any) -> Any:
  return float(f'{value:.4g}') if isinstance(value, float) else value


def _write_table(out: pathlib.Path) -> None:
  """All parts there are, in markdown."""
  text = ''
  for path in sorted(out.glob('*.json')):
    rows = json.loads(path.read_text())
    names = list(rows[0])
    text += f'\n## {path.stem}\n\n| {" | ".join(names)} |\n|{"---|" * len(names)}\n'
    text += ''.join(f'| {" | ".join(str(_short(row[name])) for name in names)} |\n' for row in rows)
  run_log.write_atomically(out / 'table.md', text.lstrip())


def _milliseconds(run: Callable, *args: Any, repeats: int = 3) -> float:
  """The quickest of several runs after a first one: what else the machine does only adds."""
  jax.block_until_ready(run(*args))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    times.append(1000 * (time.perf_counter() - start))
  return min(times)


# --- one linear layer ----------------------------------------------------------------------------------------


def _linear_row(estimator: str, law: str, passes: int, shared: bool, batch: int, p: int, q: int) -> Row:
  layer = linear_layer.random_layer(jax.random.key(p + 100 * q), p, q)
  estimate = layer.estimate(estimator, Sampling(LAWS[law], passes, shared), batch)
  draws, at_once = (1000, 100) if p * q * batch * passes < 100_000 else (300, 10)
  jax.config.update('jax_disable_most_optimizations', True)    # hundreds of programs, each run once
  measured = variance.measure(estimate, layer.truth, jax.random.key(2), draws, at_once=at_once)
  jax.config.update('jax_disable_most_optimizations', False)
  predicted = variance.predicted(estimator, LAWS[law], passes, shared=shared, batch=batch, p=p, q=q, V=layer.V,
                                 S=layer.S)
  return {'estimator': estimator, 'law': law, 'passes': passes, 'sharing': 'shared' if shared else 'independent',
          'batch': batch, 'p': p, 'q': q, 'bias_z': float(measured.bias_z(layer.truth)),
          'measured': float(measured.squared_error), 'standard_error': float(measured.squared_error_se),
          'predicted': predicted, 'cosine': float(measured.cosine),
          'ms': _milliseconds(jax.jit(estimate), jax.random.key(0))}


def table1(options: argparse.Namespace) -> Iterator[Row]:
  """All combinations."""
  del options
  for p, q, batch in ((p, q, n) for p in (2, 8, 64) for q in (2, 8, 64) for n in (1, 16, 128)):
    for estimator in ('weight', 'activity'):
      for law in ('normal', 'rademacher'):
        for shared in (True, False):
          yield _linear_row(estimator, law, 1, shared, batch, p, q)


def laws(options: argparse.Namespace) -> Iterator[Row]:
  """A square layer of 8, whose activity has 8 dimensions."""
  del options
  for law in LAWS:
    for passes in (1, 2, 4, 6, 8):
      yield _linear_row('activity', law, passes, False, 16, 8, 8)


# --- networks, layer by layer --------------------------------------------------------------------------------


def _by_layer(estimate: Callable, truth: Any, draws: int, at_once: int) -> Iterator[Row]:
  """For every kernel: error relative to |truth|², cosine, bias."""
  kernels = lambda tree: {'/'.join(path[:-1]): leaf for path, leaf in flatten_dict(tree).items()
                          if path[-1] == 'kernel'}
  truth = {name: leaf for name, leaf in kernels(truth).items() if float(jnp.abs(leaf).max()) > 0}

  def statistics_of(key: jax.Array) -> dict:
    grads = {name: leaf for name, leaf in kernels(estimate(key)).items() if name in truth}
    norm = jnp.linalg.norm
    error = {name: ((g - truth[name])**2).mean() for name, g in grads.items()}
    cosine = {name: jnp.vdot(g, truth[name]) / (norm(g) * norm(truth[name])) for name, g in grads.items()}
    return {'grads': grads, 'error': error, 'cosine': cosine}

  zeros = dict.fromkeys(truth, jnp.zeros(()))
  measured = variance.measure(statistics_of, {'grads': truth, 'error': zeros, 'cosine': zeros}, jax.random.key(3),
                              draws, at_once=at_once)
  for name, leaf in truth.items():
    own = measured._replace(mean=measured.mean['grads'][name], variance=measured.variance['grads'][name])
    yield {'layer': name, 'p': leaf.shape[-2], 'q': leaf.shape[-1], 'bias_z': float(own.bias_z(leaf)),
           'measured': float(measured.mean['error'][name]),
           'standard_error': float((measured.variance['error'][name] / measured.draws)**0.5),
           'relative_error': float(measured.mean['error'][name] / (leaf**2).mean()),
           'cosine': float(measured.mean['cosine'][name])}


class MLP(nn.Module):
  """Three layers."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = nn.tanh(nn.Dense(32, name='first')(x))
    return nn.Dense(10, name='third')(nn.tanh(nn.Dense(32, name='second')(x)))


def _predicted_mlp(params: dict, x: jax.Array, y: jax.Array) -> Callable[..., dict[str, float]]:
  """Squared errors per entry of every kernel, from the norms of the gradients at weights and at activities."""
  layers = ('first', 'second', 'third')

  def forward(shift: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    inputs = [x]
    for layer, s in zip(layers, shift, strict=True):
      z = inputs[-1] @ params[layer]['kernel'] + params[layer]['bias'] + s
      inputs.append(nn.tanh(z))
    return optax.softmax_cross_entropy_with_integer_labels(z, y).mean(), inputs

  widths = [params[layer]['bias'].size for layer in layers]
  signals, inputs = jax.grad(forward, has_aux=True)([jnp.zeros((len(x), d)) for d in widths])
  weights = [jnp.concatenate([x.T @ s, s.sum(0)[None]]) for x, s in zip(inputs, signals, strict=False)]

  def predict(name: str, law: str, passes: int, joint: bool) -> dict[str, float]:
    tensors, axes = (weights, (0, 1)) if name == 'weight' else (signals, 1)
    dims = [w.size for w in weights] if name == 'weight' else widths
    errors = variance.predicted_taps(LAWS[law], [passes] * 3, dims, [(t**2).sum(axes) for t in tensors], joint=joint)
    if name == 'weight':
      return {layer: float(e / d) for layer, e, d in zip(layers, errors, dims, strict=True)}
    # The error of x sᵀ is |x|² times that of the signal s.
    return {layer: float((e * (x**2).sum(1)).sum() / params[layer]['kernel'].size)
            for layer, e, x in zip(layers, errors, inputs, strict=False)}
  return predict


def mlp(options: argparse.Namespace) -> Iterator[Row]:
  """A batch of 32 digits; 'weight' is `forward_grad` of the mean loss, 'activity' that of marked layers."""
  del options
  train = data.load('digits').train
  x, y = jnp.asarray(train.image_NxHxWxC[:32]).reshape(32, -1) / 255, jnp.asarray(train.label_N[:32])
  variables = jax.jit(MLP().init)(jax.random.key(0), x)
  losses = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda params: losses(MLP().apply({'params': params}, x), y).mean()
  truth = jax.jit(jax.grad(loss))(variables['params'])
  predict = _predicted_mlp(variables['params'], x, y)

  def activity(law: str, passes: int, joint: bool) -> Callable:
    step = value_and_activity_grad(MLP(), losses, nn.Dense, sampling=Sampling(LAWS[law], passes), separate=not joint)
    return lambda key: step(jax.lax.optimization_barrier(variables), key, x, y)[1]

  def weight(law: str, passes: int, joint: bool) -> Callable:
    del joint
    run = forward_grad(loss, law=LAWS[law], passes=passes)
    return lambda key: run(jax.lax.optimization_barrier(variables['params']), key=key)

  for name, make, joint, orthogonal in (('weight', weight, True, 'haar'), ('activity', activity, True, 'hadamard'),
                                        ('activity', activity, False, 'hadamard')):
    for law in ('normal', 'rademacher', orthogonal):
      for passes in (1, 4, 32):
        estimate, predicted = make(law, passes, joint), predict(name, law, passes, joint)
        ms = _milliseconds(jax.jit(estimate), jax.random.key(0))
        for row in _by_layer(estimate, truth, 400, 20):
          yield {'estimator': name, 'law': law, 'passes': passes, 'taps': 'joint' if joint else 'separate',
                 'sharing': 'shared' if name == 'weight' else 'independent', 'batch': 32, **row,
                 'predicted': predicted[row['layer']], 'ms': ms}


class Mixer:
  """M/8/16 on a batch of CIFAR-10, after some steps of LG-BP (at the start its heads and so gradients are zero)."""

  def __init__(self, data_dir: str | None) -> None:
    self.config = configs.base()
    self.dataset = data.load('cifar10', data_dir=data_dir)
    split = self.dataset.train
    batch = lambda n, size: data.Batch(jnp.asarray(split.image_NxHxWxC[n:n + size]),
                                       jnp.asarray(split.label_N[n:n + size]), jnp.full(size, 1 / size))
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
    """The algorithm of a name with changed fields of estimator and losses."""
    config = self.config.copy_and_resolve_references()
    config.algorithm = name
    for field, value in options.items():
      setattr(config.losses if field in config.losses else config.estimator, field, value)
    return algorithms.make(config, self.dataset)

  def estimate(self, name: str, **options: Any) -> Callable:
    """`key -> gradient`."""
    gradient = self.make(name, **options).gradient

    def run(key: jax.Array) -> Any:
      # Behind the barrier the constants are not folded: time and compilation are those of a training step.
      variables, batch = jax.lax.optimization_barrier((self.variables, self.batch))
      return gradient(variables, key, batch)[0]
    return run


CUTS = {'block': (False, False), 'block+patch': (True, False), 'block+group': (False, True), 'all': (True, True)}


def _mixer_runs() -> Iterator[tuple[str, str, dict]]:
  """(algorithm, cut, options)."""
  for law in ('normal', 'rademacher'):
    for name in ('FG-W', 'FG-A'):
      yield name, 'none', {'law': law}
    for name in ('LG-FG-W', 'LG-FG-A'):
      for cut, (patch, group) in CUTS.items():
        if law == 'rademacher' or cut == 'all':
          yield name, cut, {'law': law, 'patch': patch, 'group': group}
  for law, taps in (('hadamard', 'separate'), ('rademacher', 'joint'), ('hadamard', 'joint')):
    for passes in PASSES[taps == 'joint':]:    # one pass is the same for both laws
      yield 'LG-FG-A', 'all', {'law': law, 'taps': taps, 'passes': passes}


def mixer(options: argparse.Namespace) -> Iterator[Row]:
  """Every algorithm and cut; then passes by law and by joint or separate taps."""
  model = Mixer(options.data_dir)
  truths: dict[str, Any] = {}
  for name, cut, fields in _mixer_runs():
    target = 'LG-BP' if name.startswith('LG') else 'BP'
    if target not in truths:
      truths[target] = jax.jit(model.estimate(target))(jax.random.key(0))
    estimate = model.estimate(name, **fields)
    ms = _milliseconds(jax.jit(estimate), jax.random.key(0))
    for row in _by_layer(estimate, truths[target], options.draws, 1):
      if not row['layer'].startswith('readout') and not row['layer'].endswith('head'):
        yield {'estimator': name, 'cut': cut, 'law': fields['law'], 'passes': fields.get('passes', 1),
               'taps': fields.get('taps', 'joint'), 'sharing': 'paper', 'batch': BATCH, **row, 'ms': ms}


def passes(options: argparse.Namespace) -> Iterator[Row]:
  """Time and temporaries of LG-FG-A; the runs take turns, the quickest of each counts."""
  model = Mixer(options.data_dir)
  cases = [(law, chunk, K) for law in ('rademacher', 'hadamard') for chunk in (0, 4) for K in PASSES if chunk < K]
  programs, best = {}, dict.fromkeys(cases, float('inf'))
  for law, chunk, K in cases:
    gradient = model.make('LG-FG-A', law=law, passes=K, chunk=chunk).gradient
    programs[law, chunk, K] = jax.jit(gradient).lower(model.variables, jax.random.key(0), model.batch).compile()
  for _ in range(5):
    for case, run in programs.items():
      best[case] = min(best[case], _milliseconds(run, model.variables, jax.random.key(0), model.batch, repeats=1))
  for (law, chunk, K), run in programs.items():
    yield {'estimator': 'LG-FG-A', 'law': law, 'passes': K, 'chunk': chunk, 'batch': BATCH, 'ms': best[law, chunk, K],
           'relative_to_one_pass': best[law, chunk, K] / best[law, 0, 1], 'allowed': (1 + 2 * K) / 3,
           'temporaries_bytes': run.memory_analysis().temp_size_in_bytes}


PARTS = {'table1': (table1, figures.table1), 'laws': (laws, figures.laws), 'mlp': (mlp, figures.mlp),
         'mixer': (mixer, figures.mixer), 'passes': (passes, figures.passes)}


if __name__ == '__main__':
  configs.run(main)

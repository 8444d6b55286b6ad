"""Fits a linear read-out to a finished run's features, offline: logistic regression.

    python experiments/linear_probe.py --workdir=DIR [--data_dir=DIR] [--images=N] [--pairs=N]
        [--l2=1e-4] [--iterations=300]

The features are those that the online read-out sees: the normalised mean over tokens of the last
block, computed from the newest checkpoint. The network does not change. In a contrastive run, the
online read-out learns from pairs of augmented views; so does the probe with --pairs=N, from N pairs
of every image. DIR gets features.npz (train_x [N, C], train_y, test_x, test_y) and
linear_probe.json, which has the errors of the probe and of the online read-out, and the standard
error of the probe's test error. The program refuses a folder that is not that of a run, or that has
no checkpoint.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lfg_jax import data
from lfg_jax.data import augmentation
from lfg_jax.errors import UserError
from lfg_jax.local import info_nce
from lfg_jax.training import command_line
from lfg_jax.training.run import results
from lfg_jax.training.train import Job, first_images, load

BATCH = 500


def main(arguments: list[str]) -> None:
  """Computes the features, fits the probe and reports its errors."""
  parser = command_line.Parser(__doc__)
  parser.path('workdir', None, 'of a run', required=True)
  parser.option('data_dir', None, 'of TFDS; default: as the run had it')
  parser.number('images', None, 'number of training images, counted from the first; default: all')
  parser.number('pairs', 0, 'of views, of every training image; 0: the image', least=0)
  parser.number('l2', 1e-4, 'weight of |W|²/2', least=0, kind=float)
  parser.number('iterations', 300, 'of L-BFGS')
  options = parser.parse(arguments)
  job, state = load(options.workdir, options.data_dir)
  if options.pairs and job.config.objective != 'contrastive':
    raise UserError(
      f'--pairs is {options.pairs}, and {options.workdir} has a {job.config.objective} '
      'run, which has no views; allowed: 0'
    )
  if not isinstance(job.dataset.train, data.Arrays):
    raise UserError(
      f'{job.config.dataset} is a stream; the probe keeps all features in memory, '
      'and is for data sets that fit'
    )
  folder = results.Folder(options.workdir, __file__, arguments)
  found = probe(first_images(job, options.images), {'params': state.params, **state.rest}, options)
  report = {'step': int(state.step), **found}
  folder.write('linear_probe', **report)
  print('  '.join(f'{name} {value}' for name, value in report.items()))


def probe(job: Job, variables: dict, options: command_line.Options) -> dict[str, Any]:
  """Errors of the probe and of the online read-out; writes the features into the run's folder."""
  train_x, train_y = (
    view_features(job, variables, options.pairs)
    if options.pairs
    else features(job, variables, job.dataset.train)
  )
  test_x, test_y = features(job, variables, job.dataset.test)
  np.savez(
    options.workdir / 'features.npz', train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y
  )
  fitted = fit(train_x, train_y, job.dataset.classes, options.l2, options.iterations)
  read_out = variables['params']['readout']['linear']
  online = np.asarray(read_out['kernel']), np.asarray(read_out['bias'])
  error = lambda x, y, kernel, bias: 100 * float(np.mean((x @ kernel + bias).argmax(-1) != y))
  test_error = error(test_x, test_y, *fitted)
  return {
    'train_error_percent': error(train_x, train_y, *fitted),
    'test_error_percent': test_error,
    'test_error_percent_se': float(np.sqrt(test_error * (100 - test_error) / len(test_y))),
    'online_test_error_percent': error(test_x, test_y, *online),
    'images': job.dataset.train.examples,
    'pairs': options.pairs,
    'l2': options.l2,
    'iterations': options.iterations,
  }


def features(job: Job, variables: dict, split: data.Arrays) -> tuple[np.ndarray, np.ndarray]:
  """Features [N, C] and labels [N] of a split, computed BATCH images at a time."""
  image_NxHxWxC, label_N = split
  run = jax.jit(lambda image: job.algorithm.features(variables, image))
  return np.concatenate(
    [run(image_NxHxWxC[n : n + BATCH]) for n in range(0, len(label_N), BATCH)]
  ), np.asarray(label_N)


def view_features(job: Job, variables: dict, pairs: int) -> tuple[np.ndarray, np.ndarray]:
  """Features [N · pairs · 2, C] and labels of augmented views of the training images."""
  image_NxHxWxC, label_N = job.dataset.train
  # Training uses the first three keys.
  key = jax.random.split(jax.random.key(job.config.seed), 4)[3]
  key_RxN = jax.random.split(key, (pairs, len(label_N)))
  views = functools.partial(augmentation.views, min_area=job.config.contrastive.min_area)
  run = jax.jit(lambda keys, image: job.algorithm.features(variables, views(keys, image)))
  x = [
    run(key_N[n : n + BATCH], image_NxHxWxC[n : n + BATCH])
    for key_N in key_RxN
    for n in range(0, len(label_N), BATCH)
  ]
  return np.concatenate(x), np.tile(np.repeat(label_N, info_nce.VIEWS), pairs)


def fit(
  x_NxC: np.ndarray, y_N: np.ndarray, classes: int, l2: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
  """Kernel and bias of a logistic regression, fitted by L-BFGS on all examples.

  They minimise mean cross-entropy + l2 |W|²/2.
  """
  x, y = jnp.asarray(x_NxC), jnp.asarray(y_N)

  def loss(params: tuple[jax.Array, jax.Array]) -> jax.Array:
    kernel, bias = params
    return (
      optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias, y).mean()
      + l2 * (kernel**2).sum() / 2
    )

  optimizer = optax.lbfgs()

  def step(carry: tuple, _: None) -> tuple[tuple, None]:
    params, state = carry
    value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
    updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=loss)
    return (optax.apply_updates(params, updates), state), None

  start = (jnp.zeros((x.shape[1], classes)), jnp.zeros(classes))
  kernel, bias = jax.jit(
    lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, iterations)[0][0]
  )(start)
  return np.asarray(kernel), np.asarray(bias)


if __name__ == '__main__':
  command_line.run(main)

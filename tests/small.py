"""A small LocalMixer on random images, shared by the tests."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.data.datasets import Batch
from lfg_jax.models import mixer
from lfg_jax.models.sizes import mixer_spec, patches
from lfg_jax.training.rules import algorithms, rules


class Small(NamedTuple):
  spec: Any
  prepare: Any
  model: Any
  batch: Batch
  variables: Any


@functools.cache
def small(side=2, groups=4, channels=16, blocks=3, batch=4, classes=5, dtype=jnp.float32, **style):
  """A small model with random parameters and control variates, and a batch.

  Heads and read-out are random too: zero, their usual start, would hide errors. Calls with the same
  arguments share one model, which nobody may change.
  """
  image_shape = (2 * side, 2 * side, 1)
  spec = mixer_spec(
    f'S/{side}/{groups}',
    image_shape=image_shape,
    classes=classes,
    channels=channels,
    blocks=blocks,
    **style,
  )
  prepare = functools.partial(patches, side=side, mean=(0.5,), std=(0.3,))
  rng = np.random.default_rng(1)
  image = jnp.asarray(rng.integers(0, 256, (batch, *image_shape)), jnp.uint8)
  label = jnp.asarray(rng.integers(0, classes, batch), jnp.int32)
  weight = jnp.full((batch,), 1 / batch, dtype)
  model = mixer.staged(spec, prepare)
  algorithm = algorithms.compose(rules.REGISTRY['BP'], rules.Options(), model)
  # By shape alone: compiling the network's own initialisation takes seconds.
  shapes = jax.eval_shape(algorithm.init, jax.random.key(0))
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), dtype), shapes['params']
  )
  control_variate = {
    name: {
      layer: {'kernel': jnp.asarray(0.4 * rng.normal(size=block[layer]['kernel'].shape), dtype)}
      for layer in ('channel', 'group')
      if layer == 'group' or 'token' in block
    }
    for name, block in params.items()
    if 'group' in block
  }
  ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype), shapes)
  variables = {**ones, 'params': params, 'control_variate': control_variate}
  return Small(spec, prepare, model, Batch(image, label, weight), variables)


def compose(s, name, **options):
  """The algorithm `name` on the small model."""
  return algorithms.compose(rules.REGISTRY[name], rules.Options(**options), s.model)


def gradient(s, name, key=None, **options):
  """Gradient of the algorithm `name` on the small model; all tests share exact ones."""
  key = jax.random.key(0) if key is None else key
  run = lambda: jax.jit(compose(s, name, **options).gradient)(s.variables, key, s.batch)[0]
  if name not in ('BP', 'L-BP', 'LG-BP'):
    return run()
  of = (id(s.variables), name, *sorted(options.items()))
  if of not in _exact:
    _exact[of] = s.variables, run()  # as long as the variables live, their id is theirs
  return jax.tree.map(lambda leaf: leaf, _exact[of][1])


_exact: dict[tuple, tuple] = {}


def keep_kernels(tree):
  """The part of a parameter tree that feedback matrices replace: its kernels."""
  kept = {k: keep_kernels(v) if isinstance(v, dict) else v for k, v in tree.items()}
  return {k: v for k, v in kept.items() if k == 'kernel' or (isinstance(v, dict) and v)}


def relative_error(a, b, floor=0.01):
  """Maximum over leaves of |a - b| / |b|, where |b| is at least `floor` times the norm of the tree.

  The floor is for leaves with a gradient of exactly zero, such as a bias that a norm removes.
  """
  leaves = [
    (np.asarray(a, np.float64), np.asarray(b, np.float64))
    for a, b in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  ]
  least = floor * np.sqrt(sum((b**2).sum() for _, b in leaves))
  return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), least) for a, b in leaves)

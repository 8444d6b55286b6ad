"""The contrastive loss against a naive one, on one and several devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lfg_jax.local import info_nce
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.replicated import Cut, replicated_loss
from lfg_jax.local.targets import Targets
from tests.small import relative_error

TOLERANCE = {jnp.float32: 1e-5, jnp.float64: 1e-12}
REAL_N = jnp.arange(16) < 14  # the last example pads the batch


def naive(features, kernel, bias, real_N, contrast, cut):
  """The loss from P·G copies of all features; in each copy, only one patch and group moves."""
  N, patches, G, _ = features.shape
  stop, rows = jax.lax.stop_gradient, np.arange(N)
  is_other_NxN = (rows[:, None] != rows) & (real_N[None] | ~real_N[:, None])

  def replica(patch, group):
    own_patch = jnp.arange(patches)[:, None, None] == patch if cut.patch else True
    own_group = jnp.arange(G)[:, None] == group if cut.group else True
    copy = jnp.where(jnp.logical_and(own_patch, own_group), features, stop(features))
    z = jnp.einsum('npgc,gck->nk', copy, kernel) / patches + bias
    z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
    candidates = stop(z) if contrast.stop_gradient else z
    scores = jnp.where(is_other_NxN, z @ candidates.T / contrast.temperature, -jnp.inf)
    return -jax.nn.log_softmax(scores)[rows, rows ^ 1]

  all_groups = jax.vmap(replica, (None, 0), 1)
  all_replicas = jax.vmap(all_groups, (0, None), 1)
  return all_replicas(jnp.arange(patches if cut.patch else 1), jnp.arange(G if cut.group else 1))


def replicated(features, kernel, bias, real_N, contrast=Contrast(), cut=Cut()):
  targets = Targets(jnp.zeros(len(real_N), int), real_N.astype(features.dtype))
  return replicated_loss(
    info_nce.row_loss(contrast),
    features,
    {'kernel': kernel, 'bias': bias},
    targets,
    cut,
    mixes_rows=not contrast.stop_gradient,
  )


def mesh(devices):
  return jax.make_mesh(
    (devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
  )


def case(dtype, contrast, cut):
  """Point, direction and cotangent; the cotangent is zero for padding."""
  shapes = [(16, 4, 3, 2), (3, 2, 5), (5,)]
  keys = iter(jax.random.split(jax.random.key(3), 7))
  point, direction = ([jax.random.normal(next(keys), s, dtype) for s in shapes] for _ in range(2))
  shape = (16, 4 if cut.patch else 1, 3 if cut.group else 1)
  return point, direction, jax.random.normal(next(keys), shape, dtype) * REAL_N[:, None, None]


def derivatives(loss, point, direction, ct):
  value, tangent = jax.jvp(loss, point, direction)
  return value, tangent, jax.vjp(loss, *point)[1](ct)


@functools.cache
def expected(dtype, contrast, cut):
  point, direction, ct = case(dtype, contrast, cut)
  real_N = np.asarray(REAL_N)
  return jax.jit(lambda *a: derivatives(lambda *x: naive(*x, real_N, contrast, cut), *a))(
    point, direction, ct
  )


def fused(devices, dtype, contrast, cut):
  point, direction, ct = case(dtype, contrast, cut)
  contrast = contrast._replace(axis_name='data')

  def local(features, kernel, bias, d_features, d_kernel, d_bias, ct, real_N):
    loss = lambda *x: replicated(*x, real_N, contrast, cut)
    value, tangent, (g, *head) = derivatives(
      loss, (features, kernel, bias), (d_features, d_kernel, d_bias), ct
    )
    return value, tangent, (g, *jax.lax.psum(head, 'data'))

  rows, whole = P('data'), P()
  run = jax.shard_map(
    local,
    mesh=mesh(devices),
    out_specs=(rows, rows, (rows, whole, whole)),
    check_vma=False,
    in_specs=(rows, whole, whole, rows, whole, whole, rows, rows),
  )
  return jax.device_get(jax.jit(run)(*point, *direction, ct, REAL_N))


CUTS = [Cut(), Cut(False, True), Cut(True, False), Cut(False, False)]


CASES = list(itertools.product([jnp.float32, jnp.float64], [True, False], CUTS))
FULL = [pytest.param(*case, marks=pytest.mark.full) for case in CASES]


@pytest.mark.parametrize(('dtype', 'stop', 'cut'), [*FULL[:-4], CASES[-4], *FULL[-3:]])
def test_fused_loss_equals_naive_on_any_number_of_devices(dtype, stop, cut):
  contrast = Contrast(temperature=0.5, stop_gradient=stop)
  with jax.enable_x64(dtype == jnp.float64):
    wanted = jax.device_get(expected(dtype, contrast, cut))
    for devices in (1, 2, 8):
      value, tangent, cotangent = fused(devices, dtype, contrast, cut)
      real = np.asarray(REAL_N)
      assert relative_error(value[real], wanted[0][real]) < TOLERANCE[dtype]
      assert relative_error(tangent[real], wanted[1][real]) < TOLERANCE[dtype]
      assert relative_error(list(cotangent), list(wanted[2])) < TOLERANCE[dtype]
      assert np.isfinite(value).all() and np.isfinite(tangent).all()


def test_memory_does_not_grow_with_the_number_of_replicas():
  """A [64, 64] array for each of 1,024 replicas would take 16 MiB; the features take 1 MiB."""
  for stop in (True, False):
    contrast = Contrast(stop_gradient=stop)
    loss = lambda f, w: replicated(f, w, jnp.zeros(16), jnp.ones(64, bool), contrast)  # noqa: B023
    args = (
      jax.ShapeDtypeStruct((64, 64, 16, 4), jnp.float32),
      jax.ShapeDtypeStruct((16, 4, 16), jnp.float32),
    )
    forward = jax.jit(lambda f, w: jax.jvp(loss, (f, w), (f, w)))  # noqa: B023
    reverse = jax.jit(jax.grad(lambda f, w: loss(f, w).sum(), (0, 1)))  # noqa: B023
    for function in (forward, reverse):
      assert function.lower(*args).compile().memory_analysis().temp_size_in_bytes < 6 * 2**20

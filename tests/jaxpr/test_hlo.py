"""What is read from a compiled program: products, collectives, loops and branches."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lfg_jax.jaxpr import hlo


def text(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def on_mesh(function, *arguments, shape=(4, 2)):
  mesh = jax.make_mesh(shape, ('data', 'stage'), axis_types=(AxisType.Auto,) * 2)
  return text(
    jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False), *arguments
  )


def test_products_are_counted_in_loops_and_branches():
  a, b = jnp.ones((32, 64)), jnp.ones((64, 64))
  one = 2 * 32 * 64 * 64
  assert hlo.flop(text(jnp.matmul, a, b)) == one
  assert (
    hlo.flop(text(lambda a, b: jax.lax.fori_loop(0, 5, lambda _, a: jnp.sin(a @ b), a), a, b))
    == 5 * one
  )
  assert (
    hlo.flop(text(lambda n, a, b: jax.lax.fori_loop(0, n, lambda _, a: jnp.sin(a @ b), a), 3, a, b))
    == one
  )
  branches = lambda i, a, b: jax.lax.switch(
    i, [lambda a, b: a, lambda a, b: a @ b, lambda a, b: a @ b @ b], a, b
  )
  assert hlo.flop(text(branches, 1, a, b)) == 2 * one


def test_convolutions():
  x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
  convolve = lambda x, k: jax.lax.conv_general_dilated(
    x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  assert hlo.flop(text(convolve, x, kernel)) == 2 * (2 * 8 * 8 * 16) * (3 * 3 * 3)


@pytest.mark.parametrize(
  'name, function, sent',
  [
    ('all-reduce', lambda x: jax.lax.psum(x, 'data'), 2 * 3 * 4000 // 4),
    ('all-gather', lambda x: jax.lax.all_gather(x, 'data'), 3 * 4000),
    ('collective-permute', lambda x: jax.lax.ppermute(x, 'stage', [(0, 1)]), 4000),
  ],
)
def test_bytes_of_collectives(name, function, sent):
  x = jnp.ones(1000)
  assert hlo.collectives(on_mesh(function, x)) == {name: hlo.Sent(1, 4000, sent)}
  repeated = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x + function(x).reshape(-1)[:1000], x)
  assert hlo.collectives(on_mesh(repeated, x)) == {name: hlo.Sent(3, 12000, 3 * sent)}


def test_a_group_of_one_sends_nothing():
  alone = functools.partial(on_mesh, lambda x: jax.lax.psum(x, 'data'), jnp.ones(8), shape=(1, 8))
  assert hlo.collectives(alone()) == {}

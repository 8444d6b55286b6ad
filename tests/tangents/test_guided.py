"""Guided tangents are biased or unbiased as their docstrings say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lfg_jax import forward_grad
from lfg_jax.tangents import guided
from lfg_jax.tangents.distributions import Chunk, hadamard, normal
from tests.statistics import SIGMAS, is_mean, z_of_mean

D, DRAWS = 8, 20_000
G = jnp.arange(1.0, D + 1) / 4
GUIDE = jnp.stack([G + 2 * jnp.cos(jnp.arange(D)), jnp.sin(jnp.arange(D))])
Q = jnp.linalg.qr(GUIDE.T)[0]
ALONG = Q @ (Q.T @ G)


def estimates(distribution, num_tangents, chunk=None):
  run = forward_grad(
    lambda x: G @ x, distribution=distribution, num_tangents=num_tangents, chunk=chunk
  )
  keys = jax.random.split(jax.random.key(0), DRAWS)
  return np.asarray(jax.jit(jax.vmap(lambda key: run(jnp.zeros(D), key=key)))(keys))


def largest_z(samples, mean):
  return z_of_mean(samples, mean).max()


def squared_errors(samples):
  return ((samples - np.asarray(G)) ** 2).sum(1)


def test_along_is_the_projection():
  assert np.allclose(estimates(guided.along(GUIDE), 2)[:3], ALONG, rtol=1e-5)
  assert not np.allclose(ALONG, G, rtol=0.1)


@pytest.mark.parametrize(('num_tangents', 'chunk'), [(3, None), (6, 2)])
def test_mixed_is_unbiased_with_the_error_of_the_rest_only(num_tangents, chunk):
  samples = estimates(guided.mixed(GUIDE), num_tangents, chunk)
  assert largest_z(samples, G) < SIGMAS < largest_z(samples, ALONG)
  expected = normal.excess(D - 2, num_tangents - 2) * float(((G - ALONG) ** 2).sum())
  assert is_mean(squared_errors(samples), expected)
  assert expected < normal.excess(D, num_tangents) * float((G**2).sum())


@pytest.mark.parametrize('distribution', [normal, hadamard])
def test_within_is_unbiased_for_gradients_of_the_span(distribution):
  samples = estimates(guided.within(GUIDE, distribution), 1)
  assert largest_z(samples, ALONG) < SIGMAS < largest_z(samples, G)
  inside = jnp.stack([G, GUIDE[1]])
  assert largest_z(estimates(guided.within(inside, distribution), 1), G) < SIGMAS
  errors = squared_errors(estimates(guided.within(inside, distribution), 1))
  assert is_mean(errors, distribution.excess(2, 1) * float((G**2).sum()))
  assert np.allclose(estimates(guided.within(inside, hadamard), 2)[0], G, rtol=1e-4)


def network_and_guide(kind):
  """Loss and flat weights of a two-layer network, and a guide that needs no backprop through it."""
  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(32, 6)), rng.integers(0, 3, 32)
  one_hot = np.eye(3)[y]
  w = {'first': rng.normal(size=(6, 5)) / 2, 'second': rng.normal(size=(5, 3)) / 2}
  x, one_hot, w = jax.tree.map(jnp.float32, (x, one_hot, w))
  output = lambda w, x: jnp.tanh(x @ w['first']) @ w['second']
  loss = lambda w, x, one_hot: -(jax.nn.log_softmax(output(w, x)) * one_hot).sum(-1).mean()
  h = jnp.tanh(x @ w['first'])
  error = (jax.nn.softmax(output(w, x)) - one_hot) / 32
  back = {
    'local gradient': w['second'].T + jnp.float32(rng.normal(size=(3, 5))),  # through a local head
    'direct feedback': jnp.float32(rng.normal(size=(3, 5))),  # through a fixed random matrix
  }
  if kind == 'momentum':
    guide = jax.grad(loss)(jax.tree.map(lambda a: a + 0.3, w), x, one_hot)  # of a step before
  else:
    guide = {'first': x.T @ (error @ back[kind] * (1 - h**2)), 'second': h.T @ error}
  flat, unravel = ravel_pytree(w)
  of_flat = lambda v: loss(unravel(v), x, one_hot)
  return of_flat, flat, ravel_pytree(guide)[0][None]


@pytest.mark.parametrize('kind', ['local gradient', 'momentum', 'direct feedback'])
def test_a_network_with_a_guide(kind):
  """It is unbiased; its error is that of the part of the gradient orthogonal to the guide."""
  loss, w, guide = network_and_guide(kind)
  gradient = np.asarray(jax.grad(loss)(w))
  run = forward_grad(loss, distribution=guided.mixed(guide), num_tangents=2)
  samples = np.asarray(
    jax.jit(jax.vmap(lambda key: run(w, key=key)))(jax.random.split(jax.random.key(0), DRAWS))
  )
  cosine = float(guide[0] @ gradient) / np.linalg.norm(guide) / np.linalg.norm(gradient)
  assert largest_z(samples, gradient) < SIGMAS < largest_z(samples, 1.1 * gradient)
  errors = ((samples - gradient) ** 2).sum(1)
  expected = normal.excess(len(w) - 1, 1) * (1 - cosine**2) * (gradient**2).sum()
  assert is_mean(errors, expected)
  assert (expected < normal.excess(len(w), 2) * (gradient**2).sum()) == (cosine**2 > 0.5)


@pytest.mark.parametrize(
  ('make', 'num_tangents'), [(guided.along, 2), (guided.mixed, 4), (guided.within, 3)]
)
def test_excess_is_that_of_a_guide_of_random_direction(make, num_tangents):
  def error(key):
    guide_key, key = jax.random.split(key)
    distribution = make(jax.random.normal(guide_key, (2, D)))
    return (
      (
        forward_grad(lambda x: G @ x, distribution=distribution, num_tangents=num_tangents)(
          jnp.zeros(D), key=key
        )
        - G
      )
      ** 2
    ).sum() / (G**2).sum()

  errors = np.asarray(jax.jit(jax.vmap(error))(jax.random.split(jax.random.key(0), DRAWS)))
  assert is_mean(errors, make(GUIDE).excess(D, num_tangents))


@pytest.mark.parametrize(
  ('distribution', 'num_tangents', 'message'),
  [
    (guided.along(GUIDE), 3, '3 tangents along a guide of 2 directions; allowed: as many'),
    (guided.mixed(GUIDE), 2, '2 tangents for a guide of 2 directions; allowed: more'),
    (guided.within(GUIDE[:, :4]), 1, r'the guide has shape \(2, 4\); allowed: \(M, 8\)'),
  ],
)
def test_what_is_refused(distribution, num_tangents, message):
  with pytest.raises(ValueError, match=message):
    distribution.draw(jax.random.key(0), Chunk(num_tangents), (), D, jnp.float32)

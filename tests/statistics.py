"""Tells a bias from noise: measurements in standard errors, and all thresholds of the tests, in σ.

Seeds are fixed: a test that passes once always passes, until something changes the draws.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

SINGLE = 4.0  # one number: beyond it by chance once in 16,000
ROW = 3.0  # one number, where the test must see twice the value as wrong: once in 370
SIGMAS = 4.5  # the largest of up to 1,000 numbers: once in 150
LARGEST = 5.5  # the largest of all M parameters of a small network: with probability M·4e-8
LEAF = 6.0  # an r.m.s. z over n numbers, which is 1 ± 1/√(2n)
# Added to 1 there: a mean of estimates is not quite normal, to 2nd order in 1/√draws.
SKEWNESS = 0.1
RMS = 1.5  # an r.m.s. z over all numbers of a small network

DRAWS, CHUNK = 20_480, 256
# Added to the standard error, times the leaf's largest entry if that is above 1. Gradient and
# estimates may have no noise but float32's last bits (a bias before a norm that removes it, a head's
# exact gradient, a layer below an exact tap). Then the mean of the rounding errors is not a bias.
# Real standard errors are above 1e-4.
ROUNDING = 1e-6


def standard_error(samples):
  """Standard error of the mean over the first axis."""
  return np.asarray(samples).std(0, ddof=1) / len(samples) ** 0.5


def z_of_mean(samples, expected, rounding=1e-9):
  """|mean over the first axis - expected| of every entry, in standard errors plus `rounding`."""
  samples = np.asarray(samples)
  return np.abs(samples.mean(0) - np.asarray(expected)) / (standard_error(samples) + rounding)


def is_mean(samples, expected, sigmas=SINGLE, slack=0.0):
  """Whether means equal `expected` up to `sigmas` standard errors, plus `slack` for rounding."""
  samples = np.asarray(samples)
  return bool(
    (
      np.abs(samples.mean(0) - np.asarray(expected)) <= sigmas * standard_error(samples) + slack
    ).all()
  )


# --- gradients of a network -----------------------------------------------------------------------


def z_scores(run, target):
  """[n] per leaf: (mean - target) / standard error, over DRAWS draws of `run(key) -> gradient`."""
  return z_scores_of_multiples(run, target)[0]


def z_scores_of_multiples(run, target, multiples=(1.0,)):
  """`z_scores` of the estimates times each number, all from the same draws.

  A test learns from them, without further draws, that it would reject estimates of another length.
  """

  @jax.jit
  def moments(key, shift):
    draws = jax.vmap(run)(jax.random.split(key, CHUNK))
    deviations = jax.tree.map(jnp.subtract, draws, shift)
    return jax.tree.map(lambda d: (d.sum(0), (d * d).sum(0)), deviations)

  total = None
  for i in range(DRAWS // CHUNK):
    part = jax.tree.map(
      lambda leaf: np.asarray(leaf, np.float64), moments(jax.random.key(i), target)
    )
    total = part if total is None else jax.tree.map(np.add, total, part)

  def z(exact, pair, c):
    """With d = g - t: the deviation of c g from t is c d + (c - 1) t."""
    t = (c - 1) * np.asarray(exact, np.float64)
    d, dd = pair[0] / DRAWS, pair[1] / DRAWS
    mean, square = c * d + t, c**2 * dd + 2 * c * t * d + t**2
    rounding = ROUNDING * max(1, np.abs(exact).max())
    return (mean / np.sqrt(np.maximum(square - mean**2, 0) / DRAWS + rounding**2)).ravel()

  return [jax.tree.map(functools.partial(z, c=c), target, total) for c in multiples]


def verdict(scores):
  """Names of the leaves that look biased.

  An unbiased leaf has an r.m.s. z within LEAF of its standard errors, and no entry beyond LARGEST.
  Entries without gradient and noise (z = 0 in all draws) do not count.
  """
  bad = []
  for path, z in jax.tree_util.tree_leaves_with_path(scores):
    z = z[z != 0]
    if not z.size:
      continue
    rms = np.sqrt((z**2).mean())
    if rms > 1 + SKEWNESS + LEAF / np.sqrt(2 * z.size) or np.abs(z).max() > LARGEST:
      bad.append(f'{jax.tree_util.keystr(path)}: r.m.s. z {rms:.2f}, largest {np.abs(z).max():.1f}')
  return bad


def is_unbiased(measured, exact):
  """Asserts that there is no bias, and that a bias of a third of the gradient would be seen."""
  assert measured.bias_z(exact) < RMS
  assert measured.bias_z(jax.tree.map(lambda g: 1.3 * g, exact)) > RMS

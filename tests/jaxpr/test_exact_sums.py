"""Products are right on CPUs, whatever XLA uses to compute them."""

import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from lfg_jax.estimators import linear_layer
from lfg_jax.jaxpr import _compat
from lfg_jax.tangents.distributions import rademacher
from lfg_jax.tangents.sampling import Sampling


def test_vmapped_estimates_in_a_scan_are_those_of_one_key_after_the_other():
  """With an unmodified jaxlib 0.11.2, they are off by a factor of 10⁴."""
  layer = linear_layer.random_layer(jax.random.key(0), 2, 64)
  estimate = layer.estimate('activity', Sampling(rademacher, 1, shared=True), 128)
  keys = jax.random.split(jax.random.key(1), (2, 100))
  together = jax.jit(
    lambda keys: jax.lax.scan(lambda carry, some: (carry, jax.vmap(estimate)(some)), 0, keys)[1]
  )
  one_by_one = jax.jit(lambda keys: jax.lax.map(estimate, keys))
  np.testing.assert_allclose(together(keys)[1, :9], one_by_one(keys[1, :9]), rtol=1e-4, atol=1e-4)


def test_the_flag_is_set_where_it_is_needed():
  assert _compat.flags('0.10.1', '--a') == '--a'
  assert _compat.flags('0.10.2', '--a') == f'--a {_compat.FLAG}='
  assert _compat.flags('0.11.2.dev3', '') == f'{_compat.FLAG}='
  assert _compat.flags('0.11.2', f'{_compat.FLAG}=dot') == f'{_compat.FLAG}=dot'


def test_too_late_is_told(monkeypatch):
  """Once JAX has looked for its devices, flags no longer have an effect."""
  jax.devices()
  monkeypatch.setattr(_compat.jaxlib, '__version__', '0.11.2')
  monkeypatch.setenv('XLA_FLAGS', '')
  with pytest.warns(UserWarning, match='JAX was used before lfg_jax was imported'):
    _compat.ensure()
  with warnings.catch_warnings(action='error'):
    _compat.ensure()  # once


def test_an_import_sets_it_in_time():
  program = """
import warnings; warnings.simplefilter('error')
import jax, lfg_jax, os; print(jax.numpy.ones(2).sum(), os.environ.get('XLA_FLAGS', ''))"""
  environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
  done = subprocess.run(
    [sys.executable, '-c', program], env=environment, capture_output=True, text=True
  )
  assert done.stdout.split() == ['2.0', *_compat.flags(jax.lib.__version__, '').split()], (
    done.stderr
  )

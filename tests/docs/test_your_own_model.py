"""The snippets of the page for users' own models run as they stand, and are right."""

import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lfg_jax
from tests.runs import ROOT
from tests.small import relative_error

PAGE = (ROOT / 'docs' / 'your_own_model.md').read_text()
X, Y = jax.random.normal(jax.random.key(1), (6, 3)), jnp.arange(6) % 2
GIVEN = {
  'jax': jax,
  'jnp': jnp,
  'lfg_jax': lfg_jax,
  'nn': nn,
  'nnx': nnx,
  'eqx': eqx,
  'x': X,
  'y': Y,
}


def run(word, **given):
  """What the page's snippet with this word defines, for a cross-entropy and these variables."""
  (code,) = (c for c in re.findall(r'```python\n(.*?)```', PAGE, re.S) if word in c)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  scope = {**GIVEN, 'cross_entropy': cross_entropy, 'key': jax.random.key(2), **given}
  exec(compile(code, word, 'exec'), scope)
  return scope


def exact(scope, *args, has_aux=False):
  losses = (lambda *a: scope['losses'](*a)[0]) if has_aux else scope['losses']
  return jax.value_and_grad(lambda *args: losses(*args).mean())(*args)


def is_exact_with_all_tangents(scope, *args, **options):
  step = lfg_jax.value_and_activity_grad(
    scope['losses'], joint=False, distribution='haar', num_tangents=4, **options
  )
  out, grads = jax.jit(step)(*args, key=jax.random.key(3))
  value, right = exact(scope, *args, **options)
  assert jnp.allclose(out[0] if options else out, value, rtol=1e-5)
  return relative_error(grads, right) < 1e-4


def test_linen():
  model = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)])
  scope = run('# Flax linen', model=model, params=model.init(jax.random.key(0), X)['params'])
  assert is_exact_with_all_tangents(scope, scope['params'], X, Y)


def moving(state):
  """Counts of dropout's keys, and statistics of batch norm."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  names = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
  is_moving = lambda name: 'count' in name or 'mean' in name
  return {name: jnp.asarray(leaf) for name, leaf in names.items() if is_moving(name)}


@pytest.mark.parametrize('middle', ['dropout', 'batch norm', 'both'])
def test_nnx_with_state(middle):
  rngs = nnx.Rngs(0)
  layers = {'dropout': [nnx.Dropout(0.5, rngs=rngs)], 'batch norm': [nnx.BatchNorm(4, rngs=rngs)]}
  layers['both'] = [*layers['dropout'], *layers['batch norm']]
  parts = [nnx.Linear(3, 4, rngs=rngs), *layers[middle], nnx.Linear(4, 2, rngs=rngs)]
  model = nnx.Sequential(*parts)
  start = moving(nnx.state(model, nnx.Not(nnx.Param)))
  scope = run('# Flax NNX', model=model)
  after = moving(scope['state'])
  assert start and all((start[name] != after[name]).all() for name in start)
  again = jax.jit(scope['step'])(scope['params'], scope['state'], X, Y, key=jax.random.key(2))
  # Other masks. Batch norm in training does not read its statistics.
  assert (again[0][0] != scope['value']) == (middle != 'batch norm')
  if middle == 'dropout':  # whose examples do not mix
    assert is_exact_with_all_tangents(scope, scope['params'], scope['state'], X, Y, has_aux=True)


def test_equinox():
  scope = run('# Equinox', model=eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0)))
  assert is_exact_with_all_tangents(scope, scope['params'], X, Y)


@pytest.mark.parametrize('gradient', [lfg_jax.value_and_activity_grad, lfg_jax.forward_grad])
def test_what_is_no_array_is_named(gradient):
  model = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
  message = r'argument 1\.activation is custom_jvp, not an array; allowed: .*eqx.partition'
  with pytest.raises(TypeError, match=message):
    gradient(lambda x, model: jax.vmap(model)(x).sum(1), 1)(X, model, key=jax.random.key(0))
  with pytest.raises(TypeError, match=r"argument 0\['name'\] is str, not an array"):
    gradient(lambda w: w['a'])({'a': jnp.ones(2), 'name': 'w'}, key=jax.random.key(0))


@pytest.mark.parametrize('masked', [False, True])
def test_the_objective_of_losses_per_token(masked):
  """The page's words, and those of the docstring: the sum over all, divided by the examples."""
  B, T = 3, 5
  x, w = jax.random.normal(jax.random.key(4), (B, T, 2)), jnp.ones((2, 4))
  mask = jnp.asarray(jax.random.bernoulli(jax.random.key(5), 0.5, (B, T)), jnp.float32)
  of_tokens = lambda w: (lfg_jax.tap(x @ w, 'h', local_axes=2) ** 2).sum(-1)
  plain = lambda w: of_tokens(w) * (mask if masked else 1)
  words = re.search(r'return `(losses / T)`; with a mask, `(losses \* mask .*?)`', PAGE)[1 + masked]
  mean = lambda w: eval(words, {'losses': of_tokens(w), 'mask': mask, 'B': B, 'T': T})
  for losses, objective in (
    (plain, lambda w: plain(w).sum() / B),
    (mean, lambda w: (of_tokens(w) * mask).sum() / mask.sum() if masked else of_tokens(w).mean()),
  ):
    step = lfg_jax.value_and_activity_grad(losses, distribution='hadamard', num_tangents=4)
    value, grads = step(w, key=jax.random.key(0))
    value_0, grads_0 = jax.value_and_grad(objective)(w)
    assert jnp.allclose(value, value_0, rtol=1e-6) and relative_error(grads, grads_0) < 1e-5

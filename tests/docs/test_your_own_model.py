"""The snippets of the page for users' own models run as they stand, and are right."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lfg_jax
from tests.runs import ROOT
from tests.small import relative_error

PAGE = (ROOT / 'docs' / 'your_own_model.md').read_text()


def run(heading, dropout='nnx.Dropout(0.1, rngs=rngs)'):
  """What the page's block below a heading defines; another layer may stand for its dropout."""
  below = PAGE.partition(f'## {heading}\n')[2]
  code = re.search(r'```python\n(.*?)```', below, re.S)[1]
  scope = {}
  exec(compile(code.replace('nnx.Dropout(0.1, rngs=rngs)', dropout), heading, 'exec'), scope)
  return scope


def exact(scope, *args, has_aux=False):
  losses = (lambda *a: scope['losses'](*a)[0]) if has_aux else scope['losses']
  return jax.value_and_grad(lambda *args: losses(*args).mean())(*args)


def is_exact_with_all_tangents(scope, *args, **options):
  step = lfg_jax.value_and_activity_grad(
    scope['losses'], joint=False, distribution='haar', num_tangents=24, **options
  )  # of 8 and of 3 units: 24 is a multiple of both
  out, grads = jax.jit(step)(*args, key=jax.random.key(3))
  value, right = exact(scope, *args, **options)
  assert jnp.allclose(out[0] if options else out, value, rtol=1e-5)
  return relative_error(grads, right) < 1e-4


def test_linen():
  scope = run('Flax linen')
  assert is_exact_with_all_tangents(scope, scope['params'], scope['x'], scope['y'])


def moving(state):
  """Counts of dropout's keys, and statistics of batch norm."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  names = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
  is_moving = lambda name: 'count' in name or 'mean' in name
  return {name: jnp.asarray(leaf) for name, leaf in names.items() if is_moving(name)}


@pytest.mark.parametrize('middle', ['dropout', 'batch norm', 'both'])
def test_nnx_with_state(middle):
  layers = {'dropout': 'nnx.Dropout(0.5, rngs=rngs)', 'batch norm': 'nnx.BatchNorm(8, rngs=rngs)'}
  layers['both'] = f'{layers["dropout"]}, {layers["batch norm"]}'
  scope = run('Flax NNX', layers[middle])
  start = moving(nnx.state(scope['model'], nnx.Not(nnx.Param)))
  after = moving(scope['state'])
  assert start and all((start[name] != after[name]).all() for name in start)
  args = scope['params'], scope['state'], scope['x'], scope['y']
  again = jax.jit(scope['step'])(*args, key=jax.random.key(2))
  # Other masks. Batch norm in training does not read its statistics.
  assert (again[0][0] != scope['value']) == (middle != 'batch norm')
  if middle == 'dropout':  # whose examples do not mix
    assert is_exact_with_all_tangents(scope, *args, has_aux=True)


def test_equinox():
  scope = run('Equinox')
  assert is_exact_with_all_tangents(scope, scope['params'], scope['x'], scope['y'])


@pytest.mark.parametrize('gradient', [lfg_jax.value_and_activity_grad, lfg_jax.forward_grad])
def test_what_is_no_array_is_named(gradient):
  model = eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(0))
  message = r'argument 1\.activation is custom_jvp, not an array; allowed: .*eqx.partition'
  with pytest.raises(TypeError, match=message):
    x = jnp.ones((6, 3))
    gradient(lambda x, model: jax.vmap(model)(x).sum(1), 1)(x, model, key=jax.random.key(0))
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

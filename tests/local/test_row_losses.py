"""Row losses and heads with a hidden layer against explicit copies, and in whole rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.local import info_nce, row_losses
from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.replicated import Cut, replicated_loss
from lfg_jax.local.row_losses import ROW_LOSSES
from lfg_jax.local.targets import Targets
from lfg_jax.training.rules import algorithms
from lfg_jax.training.train import prepare
from tests.models.test_models import BATCH, FIELDS, composed, gradient
from tests.runs import tiny
from tests.small import keep_kernels, relative_error
from tests.statistics import verdict, z_scores_of_multiples

HIDDEN = 6
KINDS = {
  **{name: Heads(loss) for name, loss in ROW_LOSSES.items()},
  'hidden': Heads(hidden=HIDDEN),
  'hidden_margin': Heads(row_losses.margin, HIDDEN),
}


def case(heads, B=3, P=4, G=3, C=2, K=5):
  """Features, head, their directions, targets with a row of padding, and feedback matrices."""
  keys = iter(jax.random.split(jax.random.key(7), 20))
  width = heads.hidden or K
  shapes = {'kernel': (G, C, width), 'bias': (width,)}
  shapes |= {'out': {'kernel': (width, K), 'bias': (K,)}} if heads.hidden else {}
  draw = lambda: jax.tree.map(
    lambda shape: jax.random.normal(next(keys), shape),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  x, dx = (jax.random.normal(next(keys), (B, P, G, C)) for _ in range(2))
  targets = Targets(jnp.array([0, 4, 2]), jnp.array([0.4, 0.6, 0.0]))
  return (x, draw()), (dx, draw()), targets, draw()


def naive(heads, x, head, targets, cut):
  """The losses from a copy of features, head and loss for every patch and group."""
  _, P, G, _ = x.shape

  def replica(patch, group):
    own = (jnp.arange(P)[:, None] == patch) | (not cut.patch)
    own &= (jnp.arange(G)[None] == group) | (not cut.group)
    copy = jnp.where(own[None, ..., None], x, jax.lax.stop_gradient(x))
    z = jnp.einsum('bpgc,gck->bk', copy, head['kernel']) / P + head['bias']
    if heads.hidden:
      z = jnp.where(z > 0, z, 0) @ head['out']['kernel'] + head['out']['bias']
    return heads.row_loss(z, targets)

  all_groups = jax.vmap(replica, (None, 0), 1)
  all_replicas = jax.vmap(all_groups, (0, None), 1)
  return all_replicas(jnp.arange(P if cut.patch else 1), jnp.arange(G if cut.group else 1))


@pytest.mark.parametrize('kind', KINDS)
def test_replicated_losses_equal_copies_written_out(kind):
  heads = KINDS[kind]
  point, direction, targets, _ = case(heads)

  def derivatives(loss):
    value, tangent = jax.jvp(loss, point, direction)
    ct = jax.random.normal(jax.random.key(1), value.shape)
    return value, tangent, jax.vjp(loss, *point)[1](ct)

  def both(cut):
    return (
      derivatives(lambda x, head: replicated_loss(heads.row_loss, x, head, targets, cut)),
      derivatives(lambda x, head: naive(heads, x, head, targets, cut)),
    )

  cuts = (Cut(), Cut(False, True), Cut(True, False), Cut(False, False))
  for got, expected in jax.jit(lambda: [*map(both, cuts)])():
    assert got[0].shape == expected[0].shape
    assert max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5


def test_hidden_heads_can_be_mapped_over_tangents_and_examples():
  heads = KINDS['hidden']
  (x, head), (dx, _), targets, _ = case(heads)
  loss = lambda x, targets: replicated_loss(heads.row_loss, x, head, targets)
  along = lambda dx: jax.jvp(lambda x: loss(x, targets), (x,), (dx,))[1]
  tangents = jnp.stack([dx, 2 * dx])
  one_by_one = jax.lax.map(along, tangents)
  at_once = jax.jit(jax.vmap(along))(tangents)
  np.testing.assert_allclose(at_once, one_by_one, rtol=1e-5, atol=1e-6)
  of_example = lambda *example: loss(*jax.tree.map(lambda a: a[None], example))[0]
  one = jax.jit(jax.vmap(of_example))(x, targets)
  np.testing.assert_allclose(one, jax.jit(loss)(x, targets), rtol=1e-5)


@pytest.mark.full
def test_feedback_matrices_take_the_kernels_place_in_both_layers():
  heads = KINDS['hidden']
  (x, head), _, targets, feedback = case(heads)
  slope = jax.jit(
    lambda feedback: jax.grad(
      lambda x, head: replicated_loss(heads.row_loss, x, head, targets, feedback=feedback).sum(),
      (0, 1),
    )(x, head)
  )
  exact = slope(None)
  own = slope(keep_kernels(head))
  assert relative_error(own, exact) < 1e-6
  other = slope(keep_kernels(feedback))
  z = jnp.einsum('bpgc,gck->bk', x, head['kernel']) / 4 + head['bias']
  outputs = jax.nn.relu(z) @ head['out']['kernel'] + head['out']['bias']
  error = jax.nn.softmax(outputs) - jax.nn.one_hot(targets.label_B, 5)
  back = (error @ feedback['out']['kernel'].T) * (z > 0)
  expected = jnp.einsum('gck,bk->bgc', feedback['kernel'], back)[:, None] / 4
  assert relative_error(other[0], jnp.broadcast_to(expected, x.shape)) < 1e-5
  # The last layer learns from what it sees, whatever goes back.
  assert relative_error(other[1]['out'], exact[1]['out']) < 1e-6


# --- whole rules ----------------------------------------------------------------------------------


def two_views(key_B, image):
  """The image and its negative; ignores the key."""
  del key_B
  return jnp.stack([image, 255 - image], 1).reshape(-1, *image.shape[1:])


@pytest.mark.full
@pytest.mark.parametrize('kind', ['margin', 'hidden'])
@pytest.mark.parametrize('name', FIELDS)
def test_heads_learn_from_their_exact_gradient_by_every_rule(name, kind):
  exact = gradient(name, 'LG-BP', heads=KINDS[kind])
  for rule in ('LG-FG-A+', 'LG-FG-W'):
    ours = gradient(name, rule, heads=KINDS[kind])
    for stack, params in exact.items():
      if stack != 'readout':
        assert relative_error(ours[stack]['head'], params['head']) < 1e-5
        assert jnp.abs(params['head']['kernel']).max() > 1e-4


@pytest.mark.full
@pytest.mark.parametrize('kind', ['squared_error', 'hidden'])
def test_as_many_orthogonal_tangents_as_dimensions_are_exact(kind):
  options = {'joint': False, 'distribution': 'hadamard', 'num_tangents': 4}
  ours = gradient('mlp', 'LG-FG-A', heads=KINDS[kind], **options)
  assert relative_error(ours, gradient('mlp', 'LG-BP', heads=KINDS[kind])) < 3e-5


@pytest.mark.full
@pytest.mark.parametrize('name', FIELDS)
def test_estimates_with_a_hidden_layer_in_the_heads_are_unbiased(name):
  algorithm, variables = composed(name, 'LG-FG-A+', heads=KINDS['hidden'])
  exact = gradient(name, 'LG-BP', heads=KINDS['hidden'])
  run = lambda key: algorithm.gradient(variables, key, BATCH)[0]
  right, longer = z_scores_of_multiples(run, exact, (1, 1.1))
  assert verdict(right) == []
  assert any('head' not in line and 'readout' not in line for line in verdict(longer))


@pytest.mark.parametrize('stop_gradient', [True, False])
def test_a_hidden_layer_may_project_for_the_contrastive_loss(stop_gradient):
  contrast = Contrast(projections=4, stop_gradient=stop_gradient)
  heads = Heads(info_nce.row_loss(contrast), HIDDEN)
  with jax.enable_x64(True):
    point, direction, _, _ = case(heads, B=4, K=4)
    targets = Targets(jnp.zeros(4, int), jnp.full(4, 0.25))
    fused = lambda x, head: replicated_loss(
      heads.row_loss, x, head, targets, Cut(), mixes_rows=not stop_gradient
    )
    got = jax.jit(lambda: jax.jvp(fused, point, direction))()
    copies = lambda x, head: naive(heads, x, head, targets, Cut())
    expected = jax.jit(lambda: jax.jvp(copies, point, direction))()
  assert relative_error(got, expected) < 1e-12


def test_replication_costs_nothing_with_a_hidden_layer():
  """64 hidden units for every example and replica would take 16 MiB; features take 1 MiB."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  head = {
    'kernel': array(16, 4, 64),
    'bias': array(64),
    'out': {'kernel': array(64, 10), 'bias': array(10)},
  }
  x = array(64, 64, 16, 4)
  targets = Targets(jnp.zeros(64, int), jnp.ones(64))
  loss = lambda x, head: replicated_loss(row_losses.cross_entropy, x, head, targets)
  forward = jax.jit(lambda x, head: jax.jvp(loss, (x, head), (x, head)))
  reverse = jax.jit(jax.grad(lambda x, head: loss(x, head).sum(), (0, 1)))
  for function in (forward, reverse):
    assert function.lower(x, head).compile().memory_analysis().temp_size_in_bytes < 6 * 2**20


# --- from a file ----------------------------------------------------------------------------------


def test_what_is_wrong_with_a_loss_is_one_line(tmp_path):
  path = tmp_path / 'mine.py'
  for text, message in (
    ('row_losses = 1', f'losses.module {path} has no row_loss; it needs row_loss'),
    ('1/0', 'ZeroDivisionError: division by zero'),
    ('def row_loss(outputs, targets):\n  return outputs @ outputs', 'dot_general'),
    (
      'def row_loss(outputs, targets):\n  return outputs.sum()',
      r'gives a loss of shape \(\) for outputs \(3, 10\); allowed: \(3,\), one for each row',
    ),
    (
      'def row_loss(outputs, targets):\n  return (outputs - outputs.mean(0)).sum(1)',
      'lets the loss of a row depend on other rows; allowed: on its own outputs only',
    ),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
      prepare(tiny(losses__module=str(path)))
    assert '\n' not in str(caught.value)
  for fields, message in (
    (
      {'losses__row': 'hinge'},
      "losses.row is 'hinge'; allowed: cross_entropy, squared_error, margin",
    ),
    ({'losses__module': 'no.py'}, "losses.module is 'no.py'; allowed: a Python file that exists"),
    (
      {'losses__row': 'margin', 'objective': 'contrastive'},
      "losses.row is 'margin', and objective='contrastive' compares rows",
    ),
    ({'losses__head_hidden': -1}, 'losses.head_hidden is -1; allowed: 0 or more'),
  ):
    with pytest.raises(UserError, match=message):
      prepare(tiny(**fields))


def test_a_file_is_run_once_until_it_changes(tmp_path):
  path, ran = tmp_path / 'mine.py', tmp_path / 'ran'
  text = f"""with open({str(ran)!r}, 'a') as file:
  file.write('.')
def row_loss(outputs, targets):
  return outputs.sum(-1)
"""
  path.write_text(text)
  first = row_losses.find('', str(path))
  assert row_losses.find('', f'{tmp_path}/../{tmp_path.name}/mine.py') is first
  assert ran.read_text() == '.'
  path.write_text(text.replace('.sum', '.mean'))
  assert row_losses.find('', str(path)) is not first
  assert ran.read_text() == '..'


@pytest.mark.full
def test_the_config_decides_what_heads_learn(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('from lfg_jax.local.row_losses import margin as row_loss\n')
  digits = data.load('digits')
  batch = data.take(digits.train, jnp.arange(8))

  def slope(**fields):
    config = tiny(algorithm='LG-BP', **fields)
    algorithm = algorithms.make(config, digits)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(algorithm.init, jax.random.key(0))
    random = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    variables = jax.tree.map(random, shapes)
    return jax.jit(algorithm.gradient)(variables, jax.random.key(0), batch)[0]['stem']['head']

  named, own = slope(losses__row='margin'), slope(losses__module=str(path))
  assert relative_error(own, named) == 0
  assert relative_error(slope(), named) > 0.1
  assert slope(losses__head_hidden=6)['out']['kernel'].shape == (6, 10)

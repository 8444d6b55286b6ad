"""Heads that look ahead: the exact gradient, credit, and how the average moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lfg_jax.errors import UserError
from lfg_jax.jaxpr.tapped import Tapped
from lfg_jax.local.blockwise import stage_loss
from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.lookahead import look_ahead, next_stacks
from lfg_jax.local.replicated import Cut
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.staged import BlockContext
from lfg_jax.local.targets import Targets
from lfg_jax.training import configs, step_functions
from lfg_jax.training.rules import algorithms
from lfg_jax.training.run import warm_start
from lfg_jax.training.run.checkpoints import Checkpoints
from lfg_jax.training.train import prepare
from tests import oracle
from tests.models.test_models import BATCH, FIELDS, KEYS, composed, model_of
from tests.runs import tiny
from tests.small import relative_error
from tests.statistics import verdict, z_scores

TARGETS = Targets(BATCH.label, BATCH.weight)
AHEAD = {'head_ahead': True}


@functools.cache
def gradient(name, rule, heads=Heads(), **options):
  algorithm, variables = composed(name, rule, heads=heads, **AHEAD, **options)
  return jax.jit(algorithm.gradient)(variables, KEYS[2], BATCH)[0]


# --- the exact gradient ---------------------------------------------------------------------------


def nth(stack, tree, n):
  return jax.tree.map(lambda leaf: leaf[n], tree) if stack.is_stacked else tree


def one_by_one(name, params, ahead):
  """The objective of LG-BP: each block, followed by the one that its head looks through."""
  model, value = model_of(name), 0.0
  x = model.prepare(BATCH.image)
  for stack, after in zip(model.stacks, next_stacks(model.stacks), strict=True):
    for n in range(stack.count):
      own = nth(stack, params[stack.name], n)
      context = BlockContext('', None if after else Cut())
      x, losses, _ = stack.block({'params': own}, jax.lax.stop_gradient(x), TARGETS, context)
      if after:
        through = {**nth(stack, ahead[stack.name], n), 'head': own['head']}
        _, losses, _ = after.block({'params': through}, x, TARGETS, BlockContext('', Cut()))
      value += losses.sum()
  x = jax.lax.stop_gradient(x)
  logits, _, _ = model.read_out({'params': params['readout']}, x, TARGETS.weight_B)
  return value + (cross_entropy(logits, TARGETS) * TARGETS.weight_B).sum()


def of_mixer(params, ahead):
  """The mixer's objective from the equations, with copies of the features per patch and group."""
  tokens = model_of('mixer').prepare(BATCH.image)
  return oracle.objective(params, tokens, *TARGETS, 2, local=True, cut=True, ahead=ahead)


@pytest.mark.full
@pytest.mark.parametrize('name', FIELDS)
def test_the_exact_gradient_is_that_of_the_blocks_one_by_one(name):
  variables = composed(name, 'LG-BP', **AHEAD)[1]
  objective = of_mixer if name == 'mixer' else functools.partial(one_by_one, name)
  plain = jax.jit(jax.grad(objective))
  exact = plain(variables['params'], variables['lookahead'])
  assert relative_error(gradient(name, 'LG-BP'), exact) < 2e-4  # float32; in float64 1e-13
  elsewhere = jax.tree.map(jnp.negative, variables['lookahead'])
  assert relative_error(plain(variables['params'], elsewhere), exact) > 0.1


# --- credit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', FIELDS)
def test_the_taps_are_those_of_the_block_itself(name):
  """The average's taps are not among them, so nothing perturbs the average."""
  plain = model_of(name)
  params = jax.eval_shape(look_ahead(plain).init, KEYS[0])['params']
  ahead = jax.eval_shape(look_ahead(plain).lookahead, params)
  x, first = jax.ShapeDtypeStruct((4, *plain.input_shape), jnp.float32), plain.stacks[0].name

  def taps(model):
    loss, fixed = stage_loss([model.stacks[0].block], Cut()), {'lookahead': {'last': ahead[first]}}
    return Tapped(loss, fixed, {'last': params[first]}, x, TARGETS).taps

  assert taps(look_ahead(plain, bounded=True)) == taps(plain)
  for tap in taps(look_ahead(plain)).values():
    assert tap.local_axes == 1  # activities of all patches and groups meet in the average


def keep_credit(monkeypatch):
  """Credits activities with their own patch and group only, as without the average."""
  kept = lambda model, bounded: look_ahead(model, bounded=True)
  monkeypatch.setattr(algorithms, 'look_ahead', kept)


@pytest.mark.full
@pytest.mark.parametrize(
  ('name', 'rule', 'num_tangents'),
  [
    ('mlp', 'LG-FG-A', 8),
    ('mlp', 'LG-FG-A+', 4),
    pytest.param('mixer', 'LG-FG-A+', 8, marks=pytest.mark.full),
  ],
)
def test_as_many_orthogonal_tangents_as_dimensions_are_exact(name, rule, num_tangents):
  """They span the example if all taps are perturbed, a patch and group if the last is exact."""
  exact = gradient(name, 'LG-BP')
  estimate = gradient(name, rule, joint=False, distribution='hadamard', num_tangents=num_tangents)
  assert relative_error(estimate, exact) < 3e-5


def judge(rule):
  algorithm, variables = composed('mlp', rule, **AHEAD)
  run = lambda key: algorithm.gradient(variables, key, BATCH)[0]
  return verdict(z_scores(run, gradient('mlp', 'LG-BP')))


@pytest.mark.full
@pytest.mark.parametrize(('rule', 'noisy'), [('LG-FG-A+', "['hidden']"), ('LG-FG-W', '')])
def test_unbiased(rule, noisy):
  """Over 20,480 draws, every leaf has an r.m.s. z within 6 σ of 1, and no entry beyond 5.5 σ.

  Leaves that are exact up to rounding have no standard error; the test above covers them.
  """
  assert not [line for line in judge(rule) if noisy in line]


@pytest.mark.full
def test_the_credit_of_a_head_that_does_not_look_ahead_is_rejected(monkeypatch):
  keep_credit(monkeypatch)
  bad = judge('LG-FG-A')
  assert any("['hidden']" in line for line in bad) and any("['out']" in line for line in bad)


@pytest.mark.full
def test_weights_credited_with_their_own_group_are_rejected(monkeypatch):
  def kept(model, bounded):
    return dataclasses.replace(look_ahead(model, bounded=bounded), grouped=model.grouped)

  monkeypatch.setattr(algorithms, 'look_ahead', kept)
  bad = judge('LG-FG-W')
  assert bad and all("['out']" in line for line in bad)


@pytest.mark.full
def test_contrastive_heads_can_look_ahead():
  heads = Heads(contrast=Contrast(projections=4))
  options = {'heads': heads, 'augment': lambda key_B, image: jnp.repeat(image, 2, 0)}
  exact = gradient('mlp', 'LG-BP', **options)
  estimate = gradient('mlp', 'LG-FG-A+', **options, num_tangents=4)
  assert relative_error(estimate, exact) < 3e-5


# --- the average ----------------------------------------------------------------------------------


@pytest.mark.full
def test_the_average_follows_every_step_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
  config = tiny(
    algorithm='LG-BP', losses__head_ahead=True, losses__head_average=0.9, steps_per_dispatch=1
  )
  configs.use_model(config, 'mlp', channels=8, groups=2)
  job = prepare(config)
  run, state = step_functions.build(*job)
  inputs = next(run.feed.epoch(0, 0))[1]

  def following(params):
    """The next block of each block, by hand; the last block stands in for its own successor."""
    blocks = {layer: params['blocks'][layer] for layer in ('hidden', 'out')}
    at = lambda *n: jax.tree.map(lambda leaf: leaf[jnp.array(n)], blocks)
    return {'stem': jax.tree.map(lambda leaf: leaf[0], blocks), 'blocks': at(1, 1)}

  jax.tree.map(np.testing.assert_array_equal, state.rest['lookahead'], following(state.params))
  state = run.steps(state, 1, inputs)  # heads are zero before, and send no signal
  old = jax.device_get(state)
  state = run.steps(state, 1, inputs)
  new = jax.device_get(state)
  average = jax.tree.map(
    lambda a, p: 0.9 * a + 0.1 * p, old.rest['lookahead'], following(new.params)
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6), new.rest['lookahead'], average
  )
  assert relative_error(new.rest['lookahead'], old.rest['lookahead']) > 1e-3

  with Checkpoints(tmp_path, 1) as checkpoints:
    checkpoints.save(2, state, {}, None)
    checkpoints.close()
    stored, _ = checkpoints.restore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
  here, there = (run.steps(s, 1, inputs) for s in (state, stored))
  jax.tree.map(np.testing.assert_array_equal, here, there)

  # A run that begins with the parameters of another, which has no average, begins with theirs.
  monkeypatch.setattr(warm_start, '_newest', lambda *_: {'params': new.params, 'rest': {}})
  begun = warm_start.from_run(tmp_path, here, job.algorithm)
  jax.tree.map(np.testing.assert_array_equal, begun.rest['lookahead'], following(new.params))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'losses__head_average': 1.0}, r'losses\.head_average is 1\.0; allowed: 0 … 1, without 1'),
    ({'algorithm': 'BP'}, r'allowed: False, or one of L-BP, LG-BP, LG-FG-W, LG-FG-A\+, LG-FG-A'),
    (
      {'algorithm': 'LG-FA'},
      'losses.head_ahead=True is for rules with local losses, but not for feed',
    ),
    ({'model__norm': 'batch'}, "no average of the statistics of model.norm='batch'; allowed with"),
    (
      {'model__size': 'S/1/2'},
      'the next block, and the model has one block; allowed: False, or more',
    ),
    (
      {'algorithm': 'LG-FG-W', 'estimator__credit': 'paper'},
      "estimator.credit='paper' credits a layer",
    ),
    (
      {'pipeline_stages': 2},
      'losses.head_ahead=True lets every block learn from the next one; allowed: 1',
    ),
  ],
)
def test_what_cannot_look_ahead_is_one_line(fields, message):
  with pytest.raises(UserError, match=message) as caught:
    prepare(tiny(**{'model__size': 'S/2/2', 'losses__head_ahead': True, **fields}))
  assert '\n' not in str(caught.value)


def test_a_model_without_parameters_called_head_is_one_line():
  mlp = model_of('mlp')

  def init(key):
    params = dict(mlp.init(key)['params'])
    return {'params': {**params, 'stem': {'hidden': params['stem']['hidden']}}}

  with pytest.raises(
    ValueError, match=r"needs parameters 'head' in every block; stem has hidden; "
  ):
    look_ahead(dataclasses.replace(mlp, init=init))

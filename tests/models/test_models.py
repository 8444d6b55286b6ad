"""The rules that every staged model must obey, and a model from outside the package."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfg_jax.data import Batch
from lfg_jax.errors import UserError
from lfg_jax.local import staged
from lfg_jax.local.heads import Heads
from lfg_jax.local.info_nce import Contrast
from lfg_jax.local.replicated import Cut
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.staged import BlockContext, variables_of
from lfg_jax.local.targets import Targets
from lfg_jax.models import registry
from lfg_jax.models.registry import Images
from lfg_jax.training import configs
from lfg_jax.training.rules import algorithms, rules
from lfg_jax.training.train import prepare
from tests.runs import ROOT, tiny
from tests.small import relative_error

IMAGES = Images((4, 4, 1), 3, (0.5,), (0.3,))
FIELDS = {
  'mixer': {'size': 'S/2/2', 'channels': 8, 'blocks': 3},
  'mlp': {'channels': 8, 'groups': 2, 'blocks': 3},
  'resnet': {'stages': (2, 1), 'channels': 4, 'groups': 2, 'patches': 2},
}
KEYS = jax.random.split(jax.random.key(0), 4)
BATCH = Batch(
  jax.random.randint(KEYS[0], (4, *IMAGES.shape), 0, 256).astype(jnp.uint8),
  jnp.array([0, 1, 2, 1]),
  jnp.array([0.3, 0.3, 0.3, 0.1]),
)


def model_of(name, heads=Heads()):
  defaults = {f: entry.default for f, entry in registry.fields_of(registry.find(name)).items()}
  return registry.build(registry.find(name), {**defaults, **FIELDS[name]}, IMAGES, heads)


def composed(name, rule, axis_name=None, heads=Heads(), augment=None, **options):
  """An algorithm and random variables. (Heads of zero, the usual start, would hide errors.)"""
  algorithm = algorithms.compose(
    rules.REGISTRY[rule], rules.Options(**options), model_of(name, heads), axis_name, augment
  )

  def random(tree):  # the same parameters for all rules, whatever else they have
    rng = np.random.default_rng(1)
    return jax.tree.map(
      lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype), tree
    )

  shapes = jax.eval_shape(algorithm.init, KEYS[1])
  return algorithm, {kind: random(tree) for kind, tree in shapes.items()}


def gradient(name, rule, key=KEYS[2], **options):
  algorithm, variables = composed(name, rule, **options)
  return jax.jit(algorithm.gradient)(variables, key, BATCH)[0]


def unrolled(name, params, *, blockwise, cut):
  """The objective from a plain loop over blocks: local losses, and the loss of the read-out."""
  model, targets = model_of(name), Targets(BATCH.label, BATCH.weight)
  x, value = model.prepare(BATCH.image), 0.0
  for stack in model.stacks:
    for n in range(stack.count):
      variables = {'params': params[stack.name]}
      if stack.is_stacked:
        variables = jax.tree.map(lambda leaf, n=n: leaf[n], variables)
      x = jax.lax.stop_gradient(x) if blockwise else x
      x, losses, _ = stack.block(variables, x, targets, BlockContext('b', cut, blockwise))
      value += 0.0 if losses is None else losses.sum()
  x = jax.lax.stop_gradient(x) if cut else x
  logits, _, _ = model.read_out(variables_of({'params': params}, 'readout'), x, targets.weight_B)
  return value + (cross_entropy(logits, targets) * targets.weight_B).sum()


@pytest.mark.full
@pytest.mark.parametrize('name', FIELDS)
@pytest.mark.parametrize(
  ('rule', 'blockwise', 'cut'),
  [('BP', False, None), ('L-BP', False, Cut(False, False)), ('LG-BP', True, Cut())],
)
def test_exact_rules_are_the_gradient_of_the_blocks_one_by_one(name, rule, blockwise, cut):
  with jax.enable_x64(True):  # norms over few numbers magnify rounding
    _, variables = composed(name, rule)
    objective = lambda params: unrolled(name, params, blockwise=blockwise, cut=cut)
    exact = jax.jit(jax.grad(objective))(variables['params'])
    assert relative_error(gradient(name, rule), exact) < 1e-11


@pytest.mark.parametrize('name', FIELDS)
def test_as_many_orthogonal_tangents_as_dimensions_are_exact(name):
  """This holds for the paper's estimator, tap by tap; in ours, the last layers are exact anyway."""
  exact = gradient(name, 'LG-BP')
  num_tangents = {'mixer': 8, 'mlp': 4, 'resnet': 64}[name]
  options = {'joint': False, 'distribution': 'hadamard', 'num_tangents': num_tangents}
  assert relative_error(gradient(name, 'LG-FG-A', **options), exact) < 3e-5
  ours = gradient(name, 'LG-FG-A+')
  assert relative_error(ours, exact) > 0.01
  last = {'mixer': 'group', 'mlp': 'out', 'resnet': 'second'}[name]
  for stack in model_of(name).stacks:
    assert relative_error(ours[stack.name][last], exact[stack.name][last]) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize('name', FIELDS)
def test_a_guess_through_the_kernels_leaves_nothing(name):
  """With such control variates at all taps, one tangent is exact."""
  algorithm, variables = composed(name, 'LG-FG-A+', control_variate='all')
  for stack, layers in variables['control_variate'].items():
    variables['control_variate'][stack] = {
      layer: {'kernel': variables['params'][stack][layer]['kernel']} for layer in layers
    }
  ours = jax.jit(algorithm.gradient)(variables, KEYS[2], BATCH)[0]
  assert relative_error(ours, gradient(name, 'LG-BP')) < 3e-5


@pytest.mark.full
@pytest.mark.parametrize('name', FIELDS)
def test_an_example_has_its_noise_wherever_it_is_computed(name):
  """Two devices with half of the batch each compute the same gradient as one."""
  algorithm, variables = composed(name, 'LG-FG-A+', axis_name='data')
  halves = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), BATCH)
  run = lambda batch: algorithm.gradient(variables, KEYS[2], batch)[0]
  parts = jax.jit(jax.vmap(run, axis_name='data'))(halves)
  summed = jax.tree.map(lambda leaf: leaf.sum(0), parts)
  assert relative_error(summed, gradient(name, 'LG-FG-A+')) < 1e-5


@pytest.mark.parametrize('name', FIELDS)
def test_shapes_flops_and_taps_are_what_the_model_says(name):
  model = model_of(name)
  variables = jax.eval_shape(model.init, KEYS[0])
  x = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
  assert jax.eval_shape(model.prepare, BATCH.image).shape[1:] == model.input_shape
  logits, features = jax.eval_shape(lambda v, x: staged.evaluate(model, v, x), variables, x)
  assert logits.shape == (2, IMAGES.classes) and features.ndim == 2
  names = {stack.name for stack in model.stacks}
  assert {*variables['params']} == {*names, 'readout'}
  for stack in model.stacks:
    assert {*stack.flop} <= {*model.taps} and min(stack.flop.values()) > 0
    params = variables['params'][stack.name]
    assert params['head']['kernel'].shape[-1] == IMAGES.classes
    assert not stack.is_stacked or params['head']['bias'].shape[0] == stack.count


@pytest.mark.parametrize(
  ('name', 'guessed', 'largest'),
  [
    ('mixer', [('after_channel', 'group'), ('after_token', 'channel')], 4 * 8),
    ('mlp', [('hidden', 'out')], 16),
    ('resnet', [('first', 'second')], 4 * 4 * 4),
  ],
)
def test_what_is_derived_from_a_model(name, guessed, largest):
  """The guessed taps, the nearest to the loss first, and the size of an example's activity."""
  model = model_of(name)
  assert [*model.control_variates.items()] == guessed
  assert model.activity_bytes == 4 * largest
  assert model.shapes[0].shape == (1, *model.input_shape)


def test_half_the_digits_are_half_the_bytes():
  fields = {name: f.default for name, f in registry.fields_of(registry.find('mixer')).items()}
  fields |= {**FIELDS['mixer'], 'hidden': None, 'precision': 'bfloat16'}
  model = registry.build(registry.find('mixer'), fields, IMAGES)
  assert model.activity_bytes == max(2 * 4 * 8, 4 * 4 * 4)  # of blocks, and of the input


@pytest.mark.parametrize('taps', [(), {}, ('hidden', 'out')])
def test_taps_that_name_no_layers(taps):
  with pytest.raises(
    ValueError, match=r'the taps of the model are .*; allowed: a dict, by tap the'
  ):
    dataclasses.replace(model_of('mlp'), taps=taps)


def test_a_guess_through_a_layer_that_is_none():
  composition = composed('mlp', 'LG-FG-A+')[0].composition
  model = dataclasses.replace(composition.model, taps={'hidden': 'hidden', 'out': 'outt'})
  with pytest.raises(
    ValueError, match=r"name a layer 'outt' with a 'kernel'.*allowed: one of them"
  ):
    composition._replace(model=model).init(KEYS[0])


@pytest.mark.full
@pytest.mark.parametrize('name', ['mlp', 'resnet'])
@pytest.mark.parametrize('rule', ['BP', 'LG-BP', 'LG-FG-A+', 'DFA'])
def test_contrastive_losses(name, rule):
  algorithm = algorithms.compose(
    rules.REGISTRY[rule],
    rules.Options(),
    model_of(name, Heads(contrast=Contrast(projections=4))),
    augment=lambda key_B, image: jnp.repeat(image, 2, 0),
  )
  variables = jax.jit(algorithm.init)(KEYS[0])
  grads, aux = jax.jit(algorithm.gradient)(variables, KEYS[1], BATCH)
  assert 0 < aux['contrastive_loss'] < 2 * math.log(7)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  jax.tree.map(lambda g, p: None, grads, variables['params'])  # of one structure


PAGE = (ROOT / 'docs' / 'bring_a_model.md').read_text()
MINE = PAGE.split('```python\n')[1].split('```')[0]


def tiny_of(name, module=None, **fields):
  config = configs.load(str(ROOT / 'configs' / 'digits.py'))
  configs.use_model(config, name, module, **fields)
  config.epochs, config.batch_size, config.num_train_examples = 1, 64, 256
  return config


def test_what_is_wrong_with_a_model_is_one_line(tmp_path):
  path = tmp_path / 'mine.py'
  for name, module, text, message in (
    ('mlq', None, '', "model.name is 'mlq'; allowed: mixer, mlp, resnet, or a file of your own"),
    ('mine', 'nowhere.py', '', "model.module is 'nowhere.py'; allowed: a Python file that exists"),
    ('mine', str(path), '1/0', 'ZeroDivisionError: division by zero'),
    ('mine', str(path), 'TAPS = ()', 'has no DEFAULTS; it needs DEFAULTS, TAPS, make'),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      configs.use_model(tiny(), name, module)
  path.write_text(MINE)
  for width, allowed in ((2, '4 or more'), (7, 'multiples of 2, the number of groups')):
    with pytest.raises(UserError, match=f'model.width is {width}; allowed: {allowed}'):
      prepare(tiny_of('mine', str(path), width=width))
  for name, fields, message in (
    ('mlp', {'groups': 3}, '3 groups do not divide model.channels = 256'),
    ('mlp', {'blocks': 0}, 'model.blocks is 0; allowed: 1'),
    ('resnet', {'stages': ()}, r'model.stages is \(\); allowed: numbers of blocks'),
    ('resnet', {'stages': (1, 1, 1, 1, 1)}, 'cannot be halved'),
  ):
    with pytest.raises(UserError, match=message):
      prepare(tiny_of(name, **fields))

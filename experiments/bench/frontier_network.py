"""One model and one batch, on which frontier.py compares variants of LG-FG-A+.

`Bench` measures the variants' errors, predicts them from theory, and compiles programs to be timed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import frontier_signals
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lfg_jax.data.datasets import Batch, Dataset
from lfg_jax.local.blockwise import blockwise
from lfg_jax.local.staged import StagedModel
from lfg_jax.local.targets import Targets
from lfg_jax.models import mixer
from lfg_jax.models.mixer import TAPS
from lfg_jax.models.sizes import Run, mixer_spec, parse, patches
from lfg_jax.tangents import variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS
from lfg_jax.training.rules import algorithms, estimators
from lfg_jax.training.rules.rules import REGISTRY, Options

PyTree = Any
Variables = dict[str, PyTree]
RULE = 'LG-FG-A+'
VARIANTS: dict[str, dict[str, str]] = {
  'joint': {'joint': True, 'last_tap': 'perturbed', 'control_variate': 'none'},
  'separate': {'joint': False, 'last_tap': 'perturbed', 'control_variate': 'none'},
  'exact last': {'joint': False, 'last_tap': 'exact', 'control_variate': 'none'},
  'guess after_channel': {'joint': False, 'last_tap': 'exact', 'control_variate': 'after_channel'},
  'guess all': {'joint': False, 'last_tap': 'exact', 'control_variate': 'all'},
}
LAYERS = ('token', 'channel', 'group')  # behind each is the tap of its name
ROUNDING = 1e-6  # of errors relative to a squared gradient, in float32


class Variant(NamedTuple):
  """An estimator; `num_tangents_by_tap` has (tap, num_tangents) for taps with their own number of tangents."""

  name: str
  distribution: str
  num_tangents: int
  num_tangents_by_tap: tuple[tuple[str, int], ...] = ()

  @property
  def fields(self) -> dict[str, Any]:
    """The variant's fields of config.estimator."""
    return {
      **VARIANTS[self.name],
      'distribution': self.distribution,
      'num_tangents': self.num_tangents,
    }

  def options(self, config: ConfigDict, model: StagedModel) -> Options:
    """The variant's options; the config's fields where the variant has none."""
    options = Options.read(
      config, **self.fields, num_tangents_by_tap=dict(self.num_tangents_by_tap)
    )
    return options.of(REGISTRY[RULE], model)

  def passes_at(self, layer: str) -> int:
    return dict(self.num_tangents_by_tap).get(f'after_{layer}', self.num_tangents)


class Bench:
  """A model and the last `batch` training images."""

  def __init__(self, config: ConfigDict, dataset: Dataset, batch: int) -> None:
    self.config, self.dataset = config.copy_and_resolve_references(), dataset
    self.config.estimator.num_tangents_by_tap.update(
      dict.fromkeys(TAPS, 0)
    )  # variants have their own
    sizes = dict(config.model)
    size, _, _ = (sizes.pop(field) for field in ('size', 'name', 'module'))
    self.spec = mixer_spec(size, image_shape=dataset.image_shape, classes=dataset.classes, **sizes)
    self.batch = batch_at(dataset, dataset.train.examples - batch, batch)
    prepare = functools.partial(patches, side=parse(size)[1], mean=dataset.mean, std=dataset.std)
    self.model, self.tokens = mixer.staged(self.spec, prepare), prepare(self.batch.image)

  @property
  def has_tokens(self) -> bool:
    return any(run.spec.mix for run in self.spec.runs)

  def algorithm(self, name: str, **fields: Any) -> algorithms.Algorithm:
    """The algorithm with this name, and with changed fields of config.estimator."""
    config = self.config.copy_and_resolve_references()
    config.algorithm = name
    config.estimator.update(fields)
    return algorithms.make(config, self.dataset)

  def step(self, name: str, params: PyTree, **fields: Any) -> Callable[[], Any]:
    """A call to be timed: an algorithm's compiled gradient, and the learning of its control variates."""
    algorithm = self.algorithm(name, **fields)
    shapes = jax.eval_shape(algorithm.init, jax.random.key(0))
    rest = {
      part: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)
      for part, tree in shapes.items()
      if part != 'params'
    }

    def run(params: PyTree, rest: Variables, key: jax.Array, batch: Batch) -> tuple:
      grads, aux = algorithm.gradient({'params': params, **rest}, key, batch)
      return grads, algorithm.advance(rest, params, aux)

    arguments = (params, rest, jax.random.key(0), self.batch)
    program = jax.jit(run).lower(*arguments).compile()
    return lambda: program(*arguments)

  def exact(self, variables: Variables) -> PyTree:
    """LG-BP's gradient, and what `predict` needs to know about the taps, by run of blocks."""

    @jax.jit
    def run(variables: Variables) -> PyTree:
      learned = {
        name: variables[name] for name in ('params', 'control_variate') if name in variables
      }
      return blockwise(frontier_signals.exact, self.model, Options().cut)(
        learned, jax.random.key(0), self.tokens, self._targets
      )[2]

    return run(variables)

  def errors(self, variant: Variant) -> Callable[[Variables, PyTree, jax.Array], PyTree]:
    """`(variables, exact, keys [N]) -> {layer: {what: [N]}}`: the errors of one draw per key."""
    options = variant.options(self.config, self.model)
    estimator = estimators.build_estimator(REGISTRY[RULE], options, self.model, None, {})
    stages = blockwise(frontier_signals.recording(estimator), self.model, options.cut)

    def one(variables: Variables, exact: PyTree, key: jax.Array) -> PyTree:
      drawn = stages(variables, key, self.tokens, self._targets)[2]
      return {
        f'{run.name}/{layer}': frontier_signals.errors(run, layer, drawn[run.name], exact[run.name])
        for run, layer in self._layers()
      }

    def all_draws(variables: Variables, exact: PyTree, keys: jax.Array) -> PyTree:
      return jax.lax.map(lambda key: one(variables, exact, key), keys)

    compiled = jax.jit(all_draws)
    return lambda variables, exact, keys: compiled(self._used(variables, options), exact, keys)

  def predict(self, variant: Variant, exact: PyTree) -> dict[str, float]:
    """Predicts the squared error of the signal at every layer's tap.

    It is relative to |signal|², and a mean over blocks.
    """
    options, distribution, joint = (
      variant.options(self.config, self.model),
      DISTRIBUTIONS[variant.distribution],
      variant.name == 'joint',
    )
    predicted = {}
    for run, layer in self._layers():
      taps, tap = exact[run.name]['taps'], f'after_{layer}'
      if options.last_tap == 'exact' and layer == 'group':
        predicted[f'{run.name}/{layer}'] = 0.0
        continue
      d, K = dims(run)[layer], variant.passes_at(layer)
      noise = taps[tap]['residual' if tap in options.control_variate_taps(self.model) else 'own']
      others = sum(norms['by_group'] for name, norms in taps.items() if name != tap)
      error = variance.predicted_taps(distribution, [K, K], [d, d], [noise, others], joint=joint)[0]
      predicted[f'{run.name}/{layer}'] = float(jnp.mean(error / taps[tap]['own']))
    return predicted

  def can(self, variant: str, variables: Variables) -> bool:
    """Whether `variables` have the control variates that a variant needs."""
    try:
      self._used(variables, Variant(variant, 'hadamard', 1).options(self.config, self.model))
    except KeyError:
      return False
    return True

  @property
  def _targets(self) -> Targets:
    return Targets(self.batch.label, self.batch.weight)

  def _layers(self) -> list[tuple[Run, str]]:
    return [
      (run, layer) for run in self.spec.runs for layer in LAYERS if layer != 'token' or run.spec.mix
    ]

  def _used(self, variables: Variables, options: Options) -> Variables:
    """The variables that the variant's estimator uses."""
    used = {'params': variables['params']}
    if options.control_variate_taps(self.model):
      like = jax.eval_shape(
        self.algorithm(RULE, control_variate=options.control_variate, joint=False).init,
        jax.random.key(0),
      )
      control_variate = flatten_dict(variables.get('control_variate', {}))
      used['control_variate'] = unflatten_dict(
        {path: control_variate[path] for path in flatten_dict(like['control_variate'])}
      )
    return used


def batch_at(dataset: Dataset, first: int, size: int) -> Batch:
  """Training images from number `first` on; the first image follows the last."""
  index = np.arange(first, first + size) % dataset.train.examples
  image, label = (jnp.asarray(np.asarray(array)[index]) for array in dataset.train)
  return Batch(image, label, jnp.full(size, 1 / size))


def dims(run: Run) -> dict[str, int]:
  """Number of perturbed dimensions at every layer's tap that influence one loss."""
  spec = run.spec
  return {
    'token': spec.inputs,
    'channel': spec.hidden // spec.groups,
    'group': spec.channels // spec.groups,
  }


def warm_up(bench: Bench, steps: int, size: int = 64) -> Variables:
  """Variables after some steps of LG-BP, during which control variates also learn.

  Without these steps, heads would be zero.
  """
  teacher = bench.algorithm('LG-BP', joint=None, last_tap='auto', control_variate='auto')
  learner = bench.algorithm(RULE, **VARIANTS['guess all'])
  optimizer = optax.adam(1e-3)

  @jax.jit
  def step(params: PyTree, rest: Variables, state: Any, key: jax.Array, batch: Batch) -> tuple:
    aux = learner.gradient({'params': params, **rest}, key, batch)[1]
    updates, state = optimizer.update(teacher.gradient({'params': params}, key, batch)[0], state)
    params = optax.apply_updates(params, updates)
    return params, learner.advance(rest, params, aux), state

  rest = jax.jit(learner.init)(jax.random.key(0))
  params = rest.pop('params')
  state = optimizer.init(params)
  for n in range(steps):
    params, rest, state = step(
      params, rest, state, jax.random.key(n), batch_at(bench.dataset, size * n, size)
    )
  return {'params': params, **rest}

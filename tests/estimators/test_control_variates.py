"""Control variates of taps' gradients: they add no bias, leave the predicted error, and can be learned."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lfg_jax import Sampling, mark, tap, value_and_activity_grad
from lfg_jax.estimators import activity
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.tangents import distributions, guided, variance
from lfg_jax.tangents.distributions import Chunk
from lfg_jax.training.rules import algorithms, rules
from tests.estimators.test_unbiased import model
from tests.small import compose, gradient, relative_error, small
from tests.statistics import SIGMAS, is_mean, verdict, z_of_mean, z_scores, z_scores_of_multiples


def with_guess(s, weights):
  return {**s.variables, 'control_variate': weights}


def kernels(s):
  """The feedback weights with which a control variate equals the gradient."""
  return jax.tree.map(
    lambda _, kernel: kernel,
    s.variables['control_variate'],
    {
      name: {layer: {'kernel': s.variables['params'][name][layer]['kernel']} for layer in block}
      for name, block in s.variables['control_variate'].items()
    },
  )


def zeros(s):
  return jax.tree.map(jnp.zeros_like, s.variables['control_variate'])


WEIGHTS = {
  'nothing': zeros,
  'random': lambda s: s.variables['control_variate'],
  'the opposite': lambda s: jax.tree.map(lambda w: -2 * w, kernels(s)),
}


@pytest.mark.full
@pytest.mark.parametrize(
  'options',
  [
    {'control_variate': 'after_channel'},
    {'control_variate': 'all'},
    {'control_variate': 'all', 'sharing': 'shared', 'distribution': 'normal', 'num_tangents': 2},
  ],
  ids=['one tap', 'all taps', 'shared normal'],
)
@pytest.mark.parametrize('weights', WEIGHTS)
def test_unbiased_whatever_the_guess(weights, options):
  s = model()
  algorithm = compose(s, 'LG-FG-A+', **options)
  variables = with_guess(s, WEIGHTS[weights](s))
  scores = z_scores(
    lambda key: algorithm.gradient(variables, key, s.batch)[0], gradient(s, 'LG-BP')
  )
  assert verdict(scores) == []


@pytest.mark.full
@pytest.mark.parametrize(
  'style',
  [
    {},
    {'norm': 'batch'},
    {'norm': 'whole'},
    {'mixing': 'conv'},
    {'hidden': 32},
    {'norms': ('channel_out',)},
  ],
  ids=str,
)
def test_exact_with_the_kernels_for_feedback_and_behind_the_boundary_with_any(style):
  """With one tangent, the grouped layer is always exact, and with the right control variates all layers are."""
  s = small(groups=2, **style)
  exact = gradient(s, 'LG-BP')
  estimate = jax.jit(compose(s, 'LG-FG-A+', control_variate='all').gradient)
  right, _ = estimate(with_guess(s, kernels(s)), jax.random.key(0), s.batch)
  assert relative_error(right, exact) < 2e-5
  wrong, _ = estimate(s.variables, jax.random.key(0), s.batch)
  assert relative_error(wrong, exact) > 0.1
  for name in ('stem', 'blocks'):
    for layer in ('group', 'head'):
      assert relative_error(wrong[name][layer], exact[name][layer]) < 2e-5
    assert relative_error(wrong[name]['channel'], exact[name]['channel']) > 0.1


@pytest.mark.full
def test_no_kernel_is_read_backwards():
  """Feedback weights of zero give a control variate of zero: every draw is the same as without a control variate."""
  s = model()
  without = gradient(s, 'LG-FG-A+', control_variate='none')
  estimate = jax.jit(compose(s, 'LG-FG-A+', control_variate='all').gradient)
  assert (
    relative_error(estimate(with_guess(s, zeros(s)), jax.random.key(0), s.batch)[0], without) < 1e-5
  )
  assert relative_error(estimate(s.variables, jax.random.key(0), s.batch)[0], without) > 0.1
  with pytest.raises(
    ValueError, match="no feedback weights; allowed: variables with 'control_variate'"
  ):
    compose(s, 'LG-FG-A+').gradient({'params': s.variables['params']}, jax.random.key(0), s.batch)


@pytest.mark.full
def test_the_regression_follows_the_gradient_of_what_is_left():
  """This holds on average over tangents, and so for a full set of orthogonal tangents."""
  s = model()
  exact = compose(
    s,
    'LG-FG-A+',
    control_variate='all',
    distribution='hadamard',
    num_tangents=4,
    num_tangents_by_tap={'after_token': 8},
  )
  one = compose(s, 'LG-FG-A+', control_variate='all')
  target = jax.jit(exact.gradient)(s.variables, jax.random.key(0), s.batch)[1][
    'control_variate_gradient'
  ]
  run = lambda key: one.gradient(s.variables, key, s.batch)[1]['control_variate_gradient']
  right, longer = z_scores_of_multiples(run, target, (1, 1.1))
  assert verdict(right) == []
  assert verdict(longer) != []
  # Where nothing is left there is nothing to learn.
  _, right = jax.jit(one.gradient)(with_guess(s, kernels(s)), jax.random.key(0), s.batch)
  assert max(
    jnp.abs(leaf).max() for leaf in jax.tree.leaves(right['control_variate_gradient'])
  ) < 1e-4 * max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(target))


@pytest.mark.full
def test_guesses_are_learned():
  """They start at zero. With a fixed network, the noise falls to a hundredth or less."""
  s = small(groups=2, channels=16, batch=16)
  algorithm = compose(s, 'LG-FG-A+', control_variate='all', control_variate_rate=1e-2)
  exact = gradient(s, 'LG-BP')
  shapes = jax.eval_shape(algorithm.init, jax.random.key(0))
  state = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    {name: shapes[name] for name in ('control_variate', 'control_variate_optimizer')},
  )

  @jax.jit
  def run(state):
    def step(state, key):
      grads, aux = algorithm.gradient({**s.variables, **state}, key, s.batch)
      error = {
        name: sum(
          ((a - b) ** 2).sum()
          for a, b in zip(
            jax.tree.leaves(grads['blocks'][name]),
            jax.tree.leaves(exact['blocks'][name]),
            strict=True,
          )
        )
        for name in ('token', 'channel')
      }
      return algorithm.advance(state, s.variables['params'], aux), error

    return jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 2000))[1]

  for name, errors in run(state).items():
    assert errors[-100:].mean() < 0.01 * errors[:3].mean(), name


class MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3, name='second')(nn.tanh(nn.Dense(8, name='first')(x)))


X, Y = jax.random.normal(jax.random.key(5), (4, 6)), jax.random.normal(jax.random.key(6), (4, 3))
VARIABLES = MLP().init(jax.random.key(0), X)
FIRST = 'first'


def losses(params, x, y):
  out = mark(MLP(), nn.Dense).apply({'params': params}, x)
  return ((out - y) ** 2).sum(-1)


def signal(params, z):
  """The objective's gradient at the first layer's output z."""
  rest = lambda z: nn.tanh(z) @ params['second']['kernel'] + params['second']['bias']
  return jax.grad(lambda z: ((rest(z) - Y) ** 2).sum() / len(Y))(z)


def estimates(control_variate, draws=20_000, **options):
  run = value_and_activity_grad(losses, joint=False, control_variate=control_variate, **options)
  keys = jax.random.split(jax.random.key(3), draws)
  return jax.jit(jax.vmap(lambda key: run(VARIABLES['params'], X, Y, key=key)[1]['first']))(keys)


@pytest.mark.full
def test_a_users_guess_leaves_the_error_that_theory_has():
  """The error is that of the signal; the first layer's bias sums the signal over the examples."""
  params = VARIABLES['params']
  z = X @ params['first']['kernel'] + params['first']['bias']
  g = signal(params, z)
  near = lambda activities, params, x, y: {FIRST: 0.8 * signal(params, activities[FIRST])}
  for control_variate, h in ((None, 0 * g), (near, 0.8 * g)):
    for distribution, num_tangents in ((distributions.normal, 1), (distributions.hadamard, 2)):
      samples = estimates(control_variate, distribution=distribution, num_tangents=num_tangents)[
        'bias'
      ]
      errors = ((samples - g.sum(0)) ** 2).sum(-1)
      expected = distribution.excess(8, num_tangents) * ((g - h) ** 2).sum()
      assert is_mean(errors, expected)
      assert expected == pytest.approx(
        variance.predicted_taps(
          distribution, [num_tangents], [8], [float(((g - h) ** 2).sum())], joint=False
        )[0]
      )


def bias_z(samples, target):
  return z_of_mean(samples, target).max()


def test_a_guess_that_sees_the_tangent_is_biased_and_the_test_sees_it():
  """The control variate steals the key that the estimator splits over the taps in the order of evaluation."""
  params = VARIABLES['params']
  target = signal(params, X @ params['first']['kernel'] + params['first']['bias']).sum(0)
  a = jnp.cos(jnp.arange(8.0))
  fixed = lambda activities, params, x, y: {FIRST: jnp.broadcast_to(a, (4, 8))}
  assert bias_z(estimates(fixed)['bias'], target) < SIGMAS

  def one(key):
    def control_variate(activities, params, x, y):
      keys = dict(zip(activities, jax.random.split(key, len(activities)), strict=True))
      first = Tap((4, 8), jnp.float32, 2, 1)
      u = activity.draw_at_tap(Sampling(), jax.random.fold_in(keys[FIRST], 0), first, Chunk(1))[0]
      return {FIRST: (u @ a)[:, None] * u}

    run = value_and_activity_grad(losses, joint=False, control_variate=control_variate)
    return run(VARIABLES['params'], X, Y, key=key)[1]['first']['bias']

  samples = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 20_000))
  assert bias_z(samples, target) > SIGMAS
  # What theory says that it is biased by: a - d a, for each of the four examples.
  assert bias_z(samples, target + 4 * (a - 8 * a)) < SIGMAS


def test_predicted_variance_with_a_guess():
  """Table 1, with `left` as the share of the squared gradient that the control variate leaves."""
  known = functools.partial(
    variance.predicted,
    'activity',
    distributions.rademacher,
    1,
    shared=False,
    batch=4,
    p=3,
    q=5,
    V=2.0,
    S=1.0,
  )
  assert known(left=0.0) == 2.0 / 4
  assert known(left=0.5) == pytest.approx((known() + known(left=0.0)) / 2)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('LG-FG-A+', {'control_variate': 'after_group'}, "is 'after_group'; allowed: auto, none, after_channel, all"),
    ('LG-FG-A+', {'control_variate': 'all', 'every': 2}, "control_variate='all' is for activities of single blocks"),
    ('LG-FG-A', {'control_variate': 'all'}, "control_variate='all' is for activities of single blocks"),
    ('FG-A', {'last_tap': 'exact'}, "last_tap='exact' is for activity perturbation with losses per block"),
    ('LG-BP', {'control_variate': 'all'}, "estimator.control_variate='all' is for"),
    ('LG-FG-A+', {'last_tap': 'guessed'}, "last_tap is 'guessed'; allowed: auto, perturbed, exact"),
    ('LG-FG-A+', {'control_variate_rate': 0.0}, 'estimator.control_variate_rate is 0.0; allowed: more than 0'),
])  # fmt: skip
def test_what_is_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    compose(model(), name, **options)


def test_guesses_of_a_wrong_shape_or_together_are_refused():
  for name in ('first', 'z'):  # of a wrong shape, and of no tap
    run = value_and_activity_grad(
      losses, joint=False, control_variate=lambda *_, name=name: {name: X}
    )
    with pytest.raises(
      ValueError,
      match=rf"the control variate has \(4, 6\) for the tap .*'{name}'.*; allowed: .*\(4, 8\)",
    ):
      run(VARIABLES['params'], X, Y, key=jax.random.key(0))
  with pytest.raises(ValueError, match="one tap's derivative, not of the sum over taps"):
    value_and_activity_grad(losses, control_variate=lambda *_: {})


@pytest.mark.full
def test_what_the_names_stand_for():
  """One name is the paper's estimator, one is ours; options set by the user are kept."""
  ours, paper = (
    rules.Options().of(rules.REGISTRY[name], model().model) for name in ('LG-FG-A+', 'LG-FG-A')
  )
  assert (ours.joint, ours.last_tap, ours.control_variate) == (False, 'exact', 'after_channel')
  assert (paper.joint, paper.last_tap, paper.control_variate) == (True, 'perturbed', 'none')
  assert (
    rules.Options(joint=True).of(rules.REGISTRY['LG-FG-A+'], model().model).control_variate
    == 'none'
  )
  s = model()
  joint = {
    'joint': True,
    'last_tap': 'perturbed',
    'control_variate': 'none',
    'distribution': 'rademacher',
  }
  assert relative_error(gradient(s, 'LG-FG-A+', **joint), gradient(s, 'LG-FG-A')) < 1e-6
  shapes = jax.eval_shape(
    algorithms.compose(rules.REGISTRY['LG-FG-A'], rules.Options(), s.model).init, jax.random.key(0)
  )
  assert 'control_variate' not in shapes


@pytest.mark.parametrize('size', [1.0, 1e3])
def test_a_guess_in_float64_is_not_rounded(size):
  """With all orthogonal tangents the control variate cancels, if what is added is what was subtracted."""
  with jax.enable_x64(True):
    x = jnp.asarray(X, jnp.float64) / 3
    w = jax.random.normal(jax.random.key(0), (6, 4), jnp.float64)
    fun = lambda w: (jnp.sin(tap(x @ w, 'z')) ** 2).sum(-1)
    control_variate = lambda activities, w: {'z': size * jnp.cos(activities['z'])}
    run = value_and_activity_grad(
      fun, joint=False, control_variate=control_variate, distribution='hadamard', num_tangents=4
    )
    exact = jax.grad(lambda w: fun(w).mean())(w)
    assert relative_error(run(w, key=jax.random.key(1))[1], exact) < 1e-12 * size


@pytest.mark.parametrize('kind', ['within', 'along', 'mixed'])
def test_guides_in_float32_are_orthonormal_in_float64(kind):
  """So that estimates in float64 are as unbiased as tangents can be."""
  with jax.enable_x64(True):
    guide = jax.random.normal(jax.random.key(0), (2, 4), jnp.float32)
    distribution = {'within': lambda: guided.within(guide, 'haar')}.get(
      kind, lambda: getattr(guided, kind)(guide)
    )()
    num_tangents = 3 if kind == 'mixed' else 2
    u = distribution.draw(jax.random.key(1), Chunk(num_tangents), (), 4, jnp.float64)[:2]
    assert u.dtype == jnp.float64
    gram = u @ u.T
    assert abs(gram - gram[0, 0] * jnp.eye(2)).max() < 1e-14 * gram[0, 0]

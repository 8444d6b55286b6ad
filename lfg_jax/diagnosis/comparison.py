"""`compare`: gradient estimators side by side, on your own function.

*Error, cosine, bias.* All estimates x are compared with g, `jax.grad` of the mean loss, by the
statistics of `diagnose` (`bias_test`): E|x - g|²/|g|², E[x·g]/√(E|x|² |g|²), and two tests for bias.

*Time.* Every estimator is compiled by itself. Then they take turns, a few draws each, so that other work
on the machine slows down all of them alike. The draws that are timed are those that are compared.

*Theory* is that of `prediction`.
"""

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.diagnosis.bias_test import Collector, Draws, Part, accuracies, rounding
from lfg_jax.diagnosis.prediction import predicted_error
from lfg_jax.diagnosis.report import aligned, number
from lfg_jax.diagnosis.tap_shifts import Call, named
from lfg_jax.errors import one_of
from lfg_jax.estimators._arguments import Static, check_floating, wants_key
from lfg_jax.estimators._types import total
from lfg_jax.estimators.activity_gradient import value_and_activity_grad
from lfg_jax.estimators.forward_gradient import value_and_forward_grad
from lfg_jax.jaxpr import hlo

PyTree = Any
Estimator = Callable[..., tuple[Any, PyTree]]
DOORS = {'activities': value_and_activity_grad, 'weights': value_and_forward_grad}
EXACT = 'jax.grad'


class Row(NamedTuple):
  """What was measured of one estimator.

  Attributes:
    name: as given to `compare`.
    error: E|x - g|²/|g|².
    error_se: its standard error.
    predicted: the error that theory predicts; None: no theory.
    cosine: E[x·g]/√(E|x|² |g|²).
    cosine_se: its standard error.
    bias: |E[x] - g|/|g|, without the contribution of noise.
    sigmas: bias in standard deviations: the larger one of the two tests' results.
    is_biased: whether a test exceeds `bias_test.SIGMAS`, for the whole gradient or for a leaf, or an
      estimate is not finite.
    verdict: in words.
    microseconds: median time of a call.
    temporaries: bytes that the compiled call needs besides arguments and results; None: unknown.
    forward_evaluations: operations in matrix products and convolutions, in evaluations of the
      losses; None: unknown, or there are no such operations.
    draws: number of estimates.
  """

  name: str
  error: float
  error_se: float
  predicted: float | None
  cosine: float
  cosine_se: float
  bias: float
  sigmas: float
  is_biased: bool
  verdict: str
  microseconds: float
  temporaries: int | None
  forward_evaluations: float | None
  draws: int


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
  """Prints as a table; `pandas.DataFrame(comparison.rows)` is a data frame.

  Attributes:
    rows: one per estimator. The first is `jax.grad`, the gradient that all others estimate.
  """

  rows: tuple[Row, ...]

  def __getitem__(self, name: str) -> Row:
    """The row with this name."""
    found = {row.name: row for row in self.rows}
    one_of('the estimator', name, found)
    return found[name]

  def __str__(self) -> str:
    head = 'estimator | error | theory | cosine | bias, σ | µs | KiB | forwards | verdict'
    known = lambda x, text: '-' if x is None else text(x)
    cells = [
      [
        row.name,
        f'{number(row.error)} ± {row.error_se:.1g}' if row.error_se > 1e-9 else number(row.error),
        known(row.predicted, number),
        f'{row.cosine:.3f}',
        '-' if row.verdict == 'exact' else f'{min(max(row.sigmas, -999), 999):.1f}',
        f'{row.microseconds:.0f}',
        known(row.temporaries, lambda x: f'{x / 1024:.0f}'),
        known(row.forward_evaluations, lambda x: f'{x:.1f}'),
        row.verdict,
      ]
      for row in self.rows
    ]
    return '\n'.join(
      [
        f'Squared error / |gradient|², {self.rows[-1].draws} draws; forwards: matrix products, in '
        'evaluations of the losses',
        *aligned([head.split(' | '), *cells], right=range(1, 8)),
      ]
    )

  def __repr__(self) -> str:
    return str(self)

  def plot(self, axes: Any = None) -> Any:
    """Plots error against time, on log axes, and returns the figure.

    Exact estimators, which have no place on the axis of errors, are vertical lines. The markers of
    biased ones are hollow.

    Args:
      axes: matplotlib axes to draw in; None: a new figure.
    """
    if axes is None:
      import matplotlib.pyplot as plt

      _, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    for n, row in enumerate(self.rows):
      colour = f'C{n % 10}' if n else 'k'
      if row.error < 1e-9:
        axes.axvline(row.microseconds, color=colour, linestyle=':', label=f'{row.name}: exact')
        continue
      axes.errorbar(
        row.microseconds,
        row.error,
        row.error_se,
        fmt='o',
        capsize=3,
        color=colour,
        markerfacecolor='w' if row.is_biased else colour,
        label=row.name + ' (biased)' * row.is_biased,
      )
    axes.set_xscale('log')
    if any(row.error >= 1e-9 for row in self.rows):
      axes.set_yscale('log')
    axes.set(
      xlabel='µs per estimate', ylabel='squared error / |gradient|²', title='Lower left is better'
    )
    axes.grid(alpha=0.3)
    axes.legend(loc='upper left', bbox_to_anchor=(1.01, 1), fontsize='small', frameon=False)
    return axes.figure


def compare(
  estimators: Mapping[str, Mapping[str, Any] | Estimator],
  losses: Callable,
  *,
  draws: int = 1000,
  at_once: int = 20,
) -> Callable[..., Comparison]:
  """Measures gradient estimators on a function: error, bias, time, memory.

  The exact gradient is that of all losses' sum divided by the number of examples, as in
  `value_and_activity_grad`. The function is evaluated as it is, with the same dropout masks in all
  draws. A comparison is for people to read: call it outside `jax.jit`.

  Args:
    estimators: by name, either options or a function. Options are those of
      `value_and_activity_grad` or, with `'perturb': 'weights'`, of `value_and_forward_grad`. A
      function is `(params, *args, key, **kwargs) -> (value, gradient)`, and is compiled.
    losses: `(params, *args, **kwargs) -> losses`: arrays with examples on the first axis, or a
      scalar.
    draws: number of estimates of each estimator, rounded up to a multiple of `at_once`. More draws
      detect a smaller bias; with fewer than 100, a very noisy estimator may seem biased.
    at_once: how many estimates are kept in memory and compared with each other; even, and at
      least 6.

  Returns:
    `(params, *args, key, **kwargs) -> Comparison`. Its rows are those of `estimators`, after one
    of `jax.grad`. `print` it for a table; `plot()` draws error against time.

  Raises:
    ValueError: an option that does not exist, a number out of range, a gradient that is not like
      `params`, or what the estimators raise.
    TypeError: an estimator is neither options nor a function.

  >>> from lfg_jax import tap
  >>> def losses(w, x):
  ...   return ((tap(x @ w, 'h') - 1) ** 2).sum(-1)
  >>> w, x = jnp.zeros((3, 4)), jnp.eye(8, 3)
  >>> different = {'one tangent': {}, 'four': {'num_tangents': 4, 'distribution': 'hadamard'}}
  >>> result = compare(different, losses, draws=200)(w, x, key=jax.random.key(0))
  >>> [(row.name, row.predicted, row.verdict) for row in result.rows[::2]]
  [('jax.grad', 0.0, 'exact'), ('four', 0.0, 'exact')]
  >>> abs(result['one tangent'].error - result['one tangent'].predicted) < 0.1
  True
  """
  if not estimators or EXACT in estimators:
    raise ValueError(
      f'estimators are {list(estimators)}; allowed: one or more, none named {EXACT!r}'
    )
  if at_once < 6 or at_once % 2 or draws < 1:
    raise ValueError(
      f'at_once={at_once}, draws={draws}; allowed: an even at_once of 6 or more, and 1 or more'
    )
  for name, given in estimators.items():
    _check(name, given)

  def run(params: PyTree, *args: Any, key: jax.Array, **kwargs: Any) -> Comparison:
    check_floating((0,), (params,))
    fun = losses
    if wants_key(losses, (params, *args), kwargs):
      key, own = jax.random.split(key)
      fun = functools.partial(losses, key=own)
    mean = functools.partial(_mean, fun)
    exact = lambda *args, key, **kwargs: jax.value_and_grad(mean)(*args, **kwargs)
    functions = {name: _estimator(given, fun, mean) for name, given in estimators.items()}
    programs = _Programs({EXACT: exact, **functions}, mean, (params, args, kwargs))
    found = _draw(programs, key, draws, at_once)
    call = Call(fun, 0, False, {}, (params, *args), key, kwargs)
    rows = [_row(EXACT, programs, *found[EXACT], 0.0)]
    for name, given in estimators.items():
      predicted = None if callable(given) else predicted_error(call, given, programs.truth)
      rows.append(_row(name, programs, *found[name], predicted))
    return Comparison(tuple(rows))

  return run


def _check(name: str, given: Any) -> None:
  """Raises ValueError or TypeError for what is neither options nor a function."""
  if callable(given):
    return
  if not isinstance(given, Mapping):
    raise TypeError(f'estimator {name!r} is {given!r}; allowed: a dict of options, or a function')
  perturb = given.get('perturb', 'activities')
  one_of(f"'perturb' of estimator {name!r}", perturb, DOORS)
  parameters = inspect.signature(DOORS[perturb]).parameters.values()
  options = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.name != 'axis_name']
  for option in given:
    one_of(f'an option of estimator {name!r}', option, ['perturb', *options])


def _estimator(given: Any, fun: Callable, mean: Callable) -> Estimator:
  if callable(given):
    return given
  options = {option: value for option, value in given.items() if option != 'perturb'}
  if given.get('perturb') == 'weights':
    return value_and_forward_grad(mean, **options)
  return value_and_activity_grad(fun, **options)


def _mean(fun: Callable, *args: Any, **kwargs: Any) -> jax.Array:
  """The sum of all losses, divided by the number of examples."""
  losses = fun(*args, **kwargs)
  first, *_ = jax.tree.leaves(losses)
  return total(losses) / (jnp.shape(first)[0] if jnp.ndim(first) else 1)


class _Programs:
  """Compiled estimators, and the gradient that they estimate.

  Attributes:
    truth: leaves of the exact gradient.
    names: of these leaves.
  """

  def __init__(self, functions: dict[str, Estimator], mean: Callable, call: tuple) -> None:
    params, args, kwargs = call
    static = Static()
    as_array = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    self._inputs = params, static.split(jax.tree.map(as_array, (args, kwargs)))

    def of_inputs(function: Callable, params: PyTree, arrays: list, **key: Any) -> Any:
      args, kwargs = static.join(arrays)
      return function(params, *args, **key, **kwargs)

    def one(function: Estimator, *inputs: Any, key: jax.Array, draw: jax.Array) -> PyTree:
      return of_inputs(function, *inputs, key=jax.random.fold_in(key, draw))[1]

    each = {name: jax.jit(functools.partial(one, f)) for name, f in functions.items()}
    draw = {'key': jax.random.key(0), 'draw': np.uint32(0)}
    for name, function in each.items():
      _check_gradient(name, params, jax.eval_shape(function, *self._inputs, **draw))
    self.compiled = {name: f.lower(*self._inputs, **draw).compile() for name, f in each.items()}
    value = jax.jit(functools.partial(of_inputs, mean)).lower(*self._inputs).compile()
    self._forward = hlo.flop(value.as_text() or '')
    exact = named(self(EXACT, jax.random.key(0), 0), 'the gradient')
    self.names, self.truth = list(exact), list(exact.values())

  def __call__(self, name: str, key: jax.Array, draw: int) -> PyTree:
    """One estimate."""
    return self.compiled[name](*self._inputs, key=key, draw=np.uint32(draw))

  def temporaries(self, name: str) -> int | None:
    analysis = self.compiled[name].memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis else None

  def forward_evaluations(self, name: str) -> float | None:
    text = self.compiled[name].as_text()
    return hlo.flop(text) / self._forward if text and self._forward else None


def _check_gradient(name: str, params: PyTree, gradient: PyTree) -> None:
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  if shapes(gradient) != shapes(params):
    raise ValueError(
      f'estimator {name!r} returns a gradient of shapes {shapes(gradient)}; allowed: those of the '
      f'parameters, {shapes(params)}'
    )


def _draw(
  programs: _Programs, key: jax.Array, draws: int, at_once: int
) -> dict[str, tuple[Draws, list[float]]]:
  """Statistics of the estimates, and seconds of every call. Estimators take turns."""
  collect = Collector.of(programs.truth, [True] * len(programs.truth))
  add = jax.jit(lambda total, values: collect.add(total, [jnp.stack(x) for x in values]))
  totals = dict.fromkeys(programs.compiled, collect.nothing)
  parts: dict[str, list[Part]] = {name: [] for name in programs.compiled}
  seconds: dict[str, list[float]] = {name: [] for name in programs.compiled}
  for first in range(0, draws, at_once):
    for name in programs.compiled:
      values = []
      for draw in range(first, first + at_once):
        begin = time.perf_counter()
        values.append(jax.block_until_ready(programs(name, key, draw)))
        seconds[name].append(time.perf_counter() - begin)
      leaves = list(zip(*map(jax.tree.leaves, values), strict=True))
      totals[name], part = add(totals[name], leaves)
      parts[name].append(part)
  stacked = {name: Part(*map(jnp.stack, zip(*own, strict=True))) for name, own in parts.items()}
  return {name: (collect.draws(totals[name], stacked[name]), seconds[name]) for name in parts}


def _row(
  name: str, programs: _Programs, draws: Draws, seconds: list[float], predicted: float | None
) -> Row:
  names = [*programs.names, 'all']
  *leaves, whole = accuracies(names, (1,), [draws], rounding(programs.truth), is_orthogonal=False)
  wrong = [one for one in (whole, *leaves) if one.is_biased or not one.is_finite]
  shown = wrong[0] if wrong else whole
  return Row(
    name,
    float(whole.error[0]),
    float(whole.error_se[0]),
    predicted,
    float(whole.cosine[0]),
    float(whole.cosine_se[0]),
    whole.bias,
    max(whole.sigmas, key=abs),
    bool(wrong),
    shown.verdict if shown is whole else f'{shown.name}: {shown.verdict}',
    1e6 * float(np.median(seconds)),
    programs.temporaries(name),
    programs.forward_evaluations(name),
    len(seconds),
  )

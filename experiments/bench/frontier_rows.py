"""Rows of frontier.py: error, theory and time of every variant and layer, and allocated passes."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from frontier_network import ROUNDING, RULE, VARIANTS, Bench, Variant, dims

from lfg_jax.tangents import variance
from lfg_jax.tangents.distributions import DISTRIBUTIONS
from lfg_jax.training.command_line import Options
from lfg_jax.training.cost import timing

Row = dict[str, Any]
Steps = dict[Any, Callable[[], Any]]
SINGLE = 'normal'  # the distribution that is measured with one tangent only
ALLOCATED = 'guess after_channel'  # the variant whose passes are allocated, and its distribution
DISTRIBUTION = 'hadamard'
BUDGETS = (2, 8, 32)  # of allocations: the time of this many tangents at every tap
WITHIN = 3  # standard errors


def measure(bench: Bench, points: dict[str, dict], options: Options) -> list[Row]:
  """Rows of all variants, then of allocated num_tangents, at every point.

  `points` has the variables at every point, by its name.
  """
  variants = [
    Variant(name, distribution, K)
    for name in options.variants
    for distribution in options.distributions
    for K in options.num_tangents
    if distribution != SINGLE or K == 1
  ]
  params = points['start']['params']
  steps: Steps = {
    'BP': bench.step('BP', params, joint=None, last_tap='auto', control_variate='auto'),
    'paper': bench.step(
      RULE, params, **VARIANTS['joint'], distribution=DISTRIBUTION, num_tangents=1
    ),
  }
  steps |= {variant: _step(bench, variant, params) for variant in variants}
  ms = _ms(steps, options.repetitions)
  errors = {variant: bench.errors(variant) for variant in variants}
  exact = {point: bench.exact(variables) for point, variables in points.items()}
  rows = []
  for point, variables in points.items():
    for variant in variants:
      if not bench.can(variant.name, variables):
        print(
          f'{point}: {variant} left out: this run has not learned its control variate, as one with '
          '--config.estimator.control_variate=all does'
        )
        continue
      for row in _rows(bench, variant, errors[variant], variables, exact[point], options.draws):
        rows.append({'point': point, **row, **_time(variant, ms)})
    print(f'{point}: {len(rows)} rows', flush=True)
  return rows + list(_allocated(bench, points, exact, rows, steps, options))


def _step(bench: Bench, variant: Variant, params: Any) -> Callable[[], Any]:
  return bench.step(
    RULE, params, **variant.fields, num_tangents_by_tap=dict(variant.num_tangents_by_tap)
  )


def _ms(steps: Steps, repetitions: int) -> dict[Any, float]:
  timed = timing.interleaved(steps, repetitions)
  return {name: timing.median_ms(seconds) for name, seconds in timed.items()}


def _time(name: Any, ms: dict[Any, float]) -> Row:
  return {
    'ms': ms[name],
    'ratio_to_bp': ms[name] / ms['BP'],
    'ratio_to_paper': ms[name] / ms['paper'],
  }


def _rows(
  bench: Bench, variant: Variant, errors: Callable, variables: dict, exact: Any, draws: int
) -> list[Row]:
  """A row for every layer.

  If a row is too far from theory, the variant is measured again with four times the draws. This
  tells chance from error: the distance of an error, in standard errors, doubles.
  """
  predicted = bench.predict(variant, exact)
  keys = lambda seed, number: jax.random.split(jax.random.key(seed), number)
  rows = _of_draws(variant, errors(variables, exact, keys(1, draws)), predicted)
  again = any(abs(row['z']) > WITHIN for row in rows)
  if again:
    rows = _of_draws(variant, errors(variables, exact, keys(2, 4 * draws)), predicted)
  return [{**row, 'measured_again': again} for row in rows]


def _of_draws(variant: Variant, drawn: Any, predicted: dict[str, float]) -> list[Row]:
  """Rows with means and standard errors; z is the distance from theory in standard errors."""
  rows = []
  for layer, theory in predicted.items():
    mean = {name: float(np.mean(value)) for name, value in drawn[layer].items()}
    se = {
      name: float(np.std(value, ddof=1) / len(value) ** 0.5) for name, value in drawn[layer].items()
    }
    z = (mean['signal_error'] - theory) / np.hypot(se['signal_error'], ROUNDING)
    rows.append(
      {
        'variant': variant.name,
        'distribution': variant.distribution,
        'num_tangents': dict(variant.num_tangents_by_tap) or variant.num_tangents,
        'layer': layer,
        **mean,
        'relative_error_se': se['relative_error'],
        'signal_error_se': se['signal_error'],
        'predicted_signal_error': theory,
        'z': float(z),
      }
    )
  return rows


# --- allocation --------------------------------------------------------------------------------


def _allocated(
  bench: Bench,
  points: dict[str, dict],
  exact: dict,
  rows: list[Row],
  steps: Steps,
  options: Options,
) -> Iterator[Row]:
  """Rows of allocated passes; each budget is the time of uniform passes.

  BP, the paper's estimator and the uniform passes are timed again, in turn with the allocated ones.
  """
  budgets = [K for K in BUDGETS if Variant(ALLOCATED, DISTRIBUTION, K) in steps]
  if not (bench.has_tokens and budgets):
    return
  params = points['start']['params']
  costs = _costs(bench, params, steps, max(budgets), options.repetitions)
  chosen = {}
  for point in points:
    first = (point, ALLOCATED, DISTRIBUTION, budgets[0])
    own = [
      row
      for row in rows
      if (row['point'], row['variant'], row['distribution'], row['num_tangents']) == first
    ]
    if own:
      chosen |= {(point, K): _allocate(bench, own, costs, K) for K in budgets}
  uniform = [Variant(ALLOCATED, DISTRIBUTION, K) for K in budgets]
  beside = {name: steps[name] for name in ('BP', 'paper', *uniform)}
  timed = {v: _step(bench, v, params) for v in dict.fromkeys(chosen.values())}
  ms = _ms({**beside, **timed}, options.repetitions)
  for (point, K), variant in chosen.items():
    errors = bench.errors(variant)
    for row in _rows(bench, variant, errors, points[point], exact[point], options.draws):
      yield {
        'point': point,
        **row,
        'variant': f'{ALLOCATED}, allocated',
        **_time(variant, ms),
        'budget_passes': K,
        'budget_ms': ms[Variant(ALLOCATED, DISTRIBUTION, K)],
      }


def _costs(
  bench: Bench, params: Any, steps: Steps, most: int, repetitions: int
) -> dict[str, float]:
  """Milliseconds of one tangent at each layer's tap, from the times of one tangent and of many."""
  variants = (
    Variant(ALLOCATED, DISTRIBUTION, 1),
    Variant(ALLOCATED, DISTRIBUTION, 1, (('after_token', most),)),
    Variant(ALLOCATED, DISTRIBUTION, most),
  )
  ms = _ms(
    {variant: steps.get(variant) or _step(bench, variant, params) for variant in variants},
    repetitions,
  )
  one, tokens, all_ = (ms[variant] for variant in variants)
  least = 1e-3 * one  # if a tangent costs less than the clock's noise
  return {
    'token': max((tokens - one) / (most - 1), least),
    'channel': max((all_ - tokens) / (most - 1), least),
  }


def _allocate(bench: Bench, rows: list[Row], costs: dict[str, float], uniform: int) -> Variant:
  """The variant with the least error for the cost of `uniform` passes at every tap.

  `variance.allocate` minimises the sum of the layers' relative errors, given those of some uniform
  passes. A chunk is the passes in memory at once. If `uniform` is a whole number of chunks, whole
  chunks are allocated.
  """
  distribution, chunk, sizes = (
    DISTRIBUTIONS[DISTRIBUTION],
    bench.config.estimator.chunk or 1,
    dims(bench.spec.runs[-1]),
  )
  norms = [
    sum(
      row['relative_error'] / distribution.excess(sizes[layer], row['num_tangents'])
      for row in rows
      if row['layer'].endswith(layer)
    )
    for layer in costs
  ]
  unit = chunk if uniform % chunk == 0 else 1
  in_units = distribution._replace(excess=lambda d, number: distribution.excess(d, unit * number))
  budget = uniform / unit * sum(costs.values()) * (1 + 1e-6)  # sums of costs are rounded
  numbers = variance.allocate(
    in_units, [sizes[layer] for layer in costs], norms, list(costs.values()), budget
  )
  return Variant(
    ALLOCATED,
    DISTRIBUTION,
    1,
    tuple((f'after_{layer}', unit * number) for layer, number in zip(costs, numbers, strict=True)),
  )

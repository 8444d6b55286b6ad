"""`diagnose`: is the credit right, and how good is the estimate?

A tap that is declared too local (`local_axes`, `mixes_examples`) is credited with fewer losses than
it influences. Its estimate is then biased, but you would not notice: the loss still falls, and a
single estimate has a small cosine with the gradient even if it is unbiased. `diagnose` finds out
from derivatives.

*Influence* (`influence`). Which losses does every tap really influence, and which does it declare?

*Accuracy* (`bias_test`). How close is the estimate x to the exact gradient, for several numbers of
tangents K? Cosine and squared error follow a distribution. Write x = E[x] + noise. The noise of K
independent tangents has variance a |E[x]|²/K, so |x|² is (1 + a/K) |E[x]|² on average, and

    cos(K) = c / √(1 + a/K),

where c is the cosine of E[x] with the gradient. An unbiased estimate has c = 1; with one tap and
`rademacher`, a = d - 1. Orthogonal tangents have less noise, with 1 + a/K - 1 under the root.

*Bias* (`bias_test`). Is the mean of many draws farther from the gradient than their noise explains?

The diagnosed estimate is that of `value_and_activity_grad` itself (`with_tap_shifts`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from lfg_jax.diagnosis import bias_test, influence, tap_shifts
from lfg_jax.diagnosis.report import Diagnosis
from lfg_jax.diagnosis.tap_shifts import Call
from lfg_jax.tangents import distributions


def diagnose(
  fun: Callable,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  *,
  num_tangents: int | Sequence[int] = (1, 4, 16),
  draws: int = 1000,
  at_once: int = 20,
  probes: int = 8,
  **options: Any,
) -> Callable[..., Diagnosis]:
  """Measures the estimate that `value_and_activity_grad(fun, …)` makes at a point.

  Call it once for a new model, before training, on a small batch. It costs about
  `draws · sum(num_tangents)` evaluations. The function is evaluated as it is, with the same dropout
  masks in all draws. A diagnosis is for people to read: call it outside `jax.jit`.

  Args:
    fun: as for `value_and_activity_grad`.
    argnums: which positional arguments to differentiate.
    has_aux: whether `fun` returns a pair of losses and anything.
    num_tangents: a number of tangents K, or increasing numbers. Bias is tested with the largest.
      `num_tangents` stands for it too.
    draws: number of estimates for every K. More draws detect a smaller bias.
    at_once: how many estimates are kept in memory and compared with each other; even, and at
      least 6. They are computed one at a time.
    probes: random tangents per tap and axis, each used twice, that determine which losses the tap
      influences.
    **options: of `value_and_activity_grad`: `distribution`, `joint`, `taps`, `mixes_examples`,
      `control_variate`, …

  Returns:
    `(*args, key, **kwargs) -> Diagnosis`. It prints as two tables, and `plot()` draws the cosines.
    If the function's equations contradict what a tap declares, `value_and_activity_grad` refuses.
    The diagnosis then says so, and describes the estimate as declared, with
    `mixes_examples=False`.

  Raises:
    ValueError: a number is out of range, or `value_and_activity_grad` raises it.
    TypeError: `value_and_activity_grad` raises it.

  >>> import jax.numpy as jnp
  >>> from lfg_jax import tap
  >>> def losses(w, x):                       # the mean over the batch is not the example's own
  ...   h = tap(x @ w, 'h')
  ...   return ((h - h.mean(0)) ** 2).sum(1)
  >>> w, x = jnp.ones((3, 4)), jax.random.normal(jax.random.key(0), (8, 3))
  >>> check = diagnose(losses, num_tangents=(4,), mixes_examples=False)
  >>> check(w, x, key=jax.random.key(1)).problems[0]
  'tap h: too local: declares local_axes=1, influences along axis 0'
  """
  given = options.pop('num_tangents', num_tangents)
  num_tangents = (given,) if isinstance(given, int) else tuple(given)
  _check(num_tangents, draws, at_once, probes)
  distribution = distributions.as_distribution(
    options.get('distribution', distributions.rademacher)
  )

  def run(*args: Any, key: jax.Array, **kwargs: Any) -> Diagnosis:
    call, refused = tap_shifts.accepted(Call(fun, argnums, has_aux, options, args, key, kwargs))
    function = tap_shifts.with_tap_shifts(call)
    probe_key, near_key, draw_key = jax.random.split(jax.random.fold_in(key, 1), 3)
    taps = influence.probe(
      jax.jit(function.derivative),
      [function.point, influence.moved(function.point, near_key)],
      function.taps,
      tap_shifts.named(function.losses, 'the losses'),
      probe_key,
      probes,
    )
    count, exact = len(taps), function.exact()
    belongs = [False] * count + [True] * (len(exact) - count)
    sampled = [
      bias_test.sample(function.estimate(K), exact, key, draws, at_once, belongs)
      for K, key in zip(num_tangents, jax.random.split(draw_key, len(num_tangents)), strict=True)
    ]
    leaves = tap_shifts.named(function.point, 'gradient')
    names = [*(tap.name for tap in function.taps), *leaves, 'all']
    found = bias_test.accuracies(
      names,
      num_tangents,
      sampled,
      bias_test.rounding(exact),
      is_orthogonal=distribution.excess(64, 64) == 0,
    )
    of_taps, of_leaves = tuple(found[:count]), tuple(found[count:-1])
    size = len(sampled[0].along)
    return Diagnosis(num_tangents, size, tuple(taps), of_taps, of_leaves, found[-1], refused)

  return run


def _check(num_tangents: tuple[int, ...], draws: int, at_once: int, probes: int) -> None:
  """Raises ValueError for a number out of range."""
  if not num_tangents or num_tangents[0] < 1 or list(num_tangents) != sorted(set(num_tangents)):
    raise ValueError(f'num_tangents is {num_tangents}; allowed: increasing numbers, 1 or more')
  if at_once < 6 or at_once % 2 or draws < 1 or probes < 1:
    raise ValueError(
      f'at_once={at_once}, draws={draws}, probes={probes}; allowed: an even at_once '
      'of 6 or more, and 1 or more'
    )

"""Activity perturbation: tangents at the taps (equation 4 of the paper)."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import GradFn, Losses, LossFn, PyTree
from lfg_jax.estimators.control_variates import Guess, Learned, corrected, cotangents, regression
from lfg_jax.estimators.feedback import reverse_with_signals
from lfg_jax.jaxpr.tapped import Traced, perturb, record
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.promotion import upcast
from lfg_jax.tangents import distributions
from lfg_jax.tangents.derivatives import Derivative, along_each, jvp_derivative
from lfg_jax.tangents.distributions import Passes
from lfg_jax.tangents.sampling import (
  Sampling,
  after,
  combine,
  each_chunk,
  sum_over_chunks,
  tangent_key,
)

Names = Callable[[str], bool]


def activity_perturbation(
  fun: LossFn,
  learned: Learned | None = None,
  *,
  sampling: Sampling = Sampling(),
  derivative: Derivative = jvp_derivative,
  separate: bool = False,
  passes_of: Callable[[str], int] | None = None,
  is_perturbed: Names = lambda name: True,
  guess: Guess | None = None,
  is_guessed: Names = lambda name: True,
  redraw: bool = False,
  trace: Callable[..., Traced] = Traced,
) -> GradFn:
  """g_a(w_ij) = x_i (∇z·u) u_j, with z the activity at a tap.

  The signal of each tapped activity is u times the loss's derivative along u. The layers before
  the tap are then differentiated locally. That step is linear in the signals, so K passes cost K
  forward derivatives and one local one.

  *Joint or separate.* If all taps are perturbed in one pass, the derivative is Σ_j g_j·u_j over
  taps j, and the estimate at tap i has the squared error excess(d_i, K) |g_i|² + (d_i/K) Σ_{j≠i}
  |g_j|² (see `tangents`, "Blocks"). If each tap is perturbed separately, only the first term
  remains, and orthogonal laws with K = d_i are exact. The price is one derivative of the
  computation after every tap, instead of one after the first. After the last tap of a block, no
  matrix product remains.

  *Which taps.* A tap that is not perturbed is transparent: the exact cotangent passes through it,
  and reverse mode reaches back to the perturbed taps before it. After the last tap of a block with
  a local loss, only a norm, a ReLU and the head remain, and the head learns from its exact
  gradient in the paper too.

  *Guesses* of the derivatives remove noise and add no bias: see `guesses`.

  Args:
    learned: a guess that learns; aux then holds its gradient as 'guess_gradient'.
    sampling: for every tap; `combine='projection'` needs `separate`.
    derivative: `jvp_derivative` or `finite_difference(ε)`.
    separate: whether to perturb each tap separately. (The taps of scanned layers are one tap.)
    passes_of: with `separate`, a function from a tap's name to its number of passes; default: that
      of `sampling`. `variance.allocate` finds good numbers.
    is_perturbed: which taps to perturb, by name; the others let the exact signal pass.
    guess: with `separate`, another guess of the taps' gradients.
    is_guessed: the taps that `learned` guesses, by name.
    redraw: whether to draw tangents a second time when the reverse sweep reaches their layer, so
      that the tangents of all taps are never in memory together.
    trace: makes the jaxpr of `fun`.

  >>> from lfg_jax.jaxpr.taps import tap
  >>> loss = lambda w, x: (tap(x @ w, 'z').sum(-1), {})
  >>> exact = Sampling(distributions.hadamard, 2)    # as many orthogonal tangents as z has dimensions
  >>> estimate = activity_perturbation(loss, sampling=exact)
  >>> estimate(jnp.ones((3, 2)), jax.random.key(0), jnp.eye(4, 3))[1].tolist()
  [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
  """
  check_options(sampling, separate, bool(passes_of), bool(guess or learned))

  def own_sampling(name: str) -> Sampling:
    return sampling._replace(passes=passes_of(name)) if passes_of else sampling

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, dict], PyTree]:
    traced, key = trace(fun, params, *args), tangent_key(key)
    taps = traced.taps
    keys = dict(zip(taps, jax.random.split(key, max(len(taps), 1)), strict=False))
    perturbed = {name: tap for name, tap in taps.items() if is_perturbed(name)}
    if sampling.shared:
      _check_shared(perturbed)
    guessed: dict[str, jax.Array] = {}  # made before any tangent is drawn, and without the key
    pull: Callable | None = None
    if learned:
      names = [name for name in perturbed if is_guessed(name)]
      guessed, pull = jax.vjp(
        lambda weights: cotangents(learned, weights, names, params, *args), learned.weights
      )
    elif guess:
      guessed = dict(guess(traced.evaluate(record, {}, params, *args)[1]))
    _check_guess(guessed, perturbed)

    evaluate = lambda u: traced.evaluate(perturb, u, params, *args)[0][0]
    together = [[name] for name in perturbed] if separate else [list(perturbed)]
    early = {name: after(key, None) for name, key in keys.items()} if redraw else keys
    slopes: dict[str, Losses] = {}
    for names in filter(None, together):
      own_taps = {name: taps[name] for name in names}
      own = _slopes(evaluate, derivative, own_sampling(names[0]), own_taps, early)
      slopes |= dict.fromkeys(names, own)

    residual: dict[str, jax.Array] = {}
    before: PyTree = slopes
    for name in reversed(perturbed):
      again = after(keys[name], before) if redraw else keys[name]
      before = residual[name] = _signal(
        own_sampling(name), taps[name], again, slopes[name], guessed.get(name)
      )
    signal = {
      name: corrected(guessed[name], r) if name in guessed else r for name, r in residual.items()
    }
    (losses, aux), grads = reverse_with_signals(traced, signal, params, *args)
    if learned and pull:
      known = {name: r for name, r in residual.items() if name in guessed}
      aux = {**aux, 'guess_gradient': regression(pull, guessed, known, taps, learned.size_B)}
    return (losses, aux), grads

  return run


def check_options(
  sampling: Sampling, separate: bool, has_own_passes: bool, has_guess: bool
) -> None:
  """Raises ValueError for options of `activity_perturbation` that contradict each other."""
  sampling.check()
  if sampling.combine == 'projection' and not separate:
    raise ValueError('a projection takes the taps one by one; allowed: separate=True')
  if has_guess and not separate:
    raise ValueError(
      "a guess is of one tap's derivative, not of the sum over taps; allowed: separate=True"
    )
  if has_own_passes and not separate:
    raise ValueError(
      'taps have numbers of passes of their own only where they are perturbed one '
      'by one; allowed: separate=True'
    )


def _check_shared(taps: Mapping[str, Tap]) -> None:
  for name, tap in taps.items():
    if tap.local_axes == 0:
      raise ValueError(
        f'tap {name!r} influences the losses of other examples, and one tangent for '
        'the whole batch cannot tell the examples apart; allowed: shared=False, an independent '
        'one for every example'
      )


def _check_guess(guessed: Mapping[str, jax.Array], taps: Mapping[str, Tap]) -> None:
  shapes = {name: tap.shape for name, tap in taps.items()}
  for name, h in guessed.items():
    if shapes.get(name) != h.shape:
      raise ValueError(f'the guess has {h.shape} for the tap {name!r}; allowed: {shapes}')


def _slopes(
  evaluate: Callable,
  derivative: Derivative,
  sampling: Sampling,
  taps: Mapping[str, Tap],
  keys: Mapping[str, jax.Array],
) -> Losses:
  """Derivatives [K, ...] of the losses along tangents at jointly perturbed taps."""
  draw = lambda passes: {
    name: draw_at_tap(sampling, keys[name], tap, passes) for name, tap in taps.items()
  }
  shapes = jax.eval_shape(lambda: draw(Passes(1)))
  at_rest = {name: jnp.zeros(u.shape[1:], u.dtype) for name, u in shapes.items()}
  along = derivative(evaluate, at_rest, sampling.at_once < sampling.passes)
  return each_chunk(lambda passes: along_each(along, draw(passes)), sampling)


def _signal(
  sampling: Sampling, tap: Tap, key: jax.Array, slopes: Losses, guessed: jax.Array | None
) -> jax.Array:
  """The estimate of a tap's gradient minus its guess, from the slopes along its tangents."""

  def part(passes: Passes) -> jax.Array:
    u_K = draw_at_tap(sampling, key, tap, passes)
    dL_K = jax.tree.map(lambda d: passes.of(d), slopes)
    slope_K = jax.vmap(lambda dL: credit(tap, dL, sampling.axis_name))(dL_K)
    front = (1,) * (u_K.ndim - slope_K.ndim)
    slope_K = slope_K.reshape(slope_K.shape[0], *front, *slope_K.shape[1:])
    if guessed is not None:
      slope_K = slope_K - _guessed_slope(tap, guessed, u_K, sampling.axis_name)
    own_axes = tap.ndim - max(tap.local_axes, 1)
    return combine(sampling.combine, slope_K, u_K, sampling.passes, own_axes)

  return jnp.broadcast_to(sum_over_chunks(part, sampling), tap.shape)


def _guessed_slope(
  tap: Tap, guessed: jax.Array, u_K: jax.Array, axis_name: str | None
) -> jax.Array:
  """h·u of each tangent, [K, *1, B, ...], summed over the axes that the tap's credit covers."""
  axes = (*range(1, 1 + tap.scanned), *range(1 + tap.scanned + tap.local_axes, u_K.ndim))
  dot_K = (upcast(guessed)[None] * upcast(u_K)).sum(axes, keepdims=True)
  return jax.lax.psum(dot_K, axis_name) if tap.local_axes == 0 and axis_name else dot_K


def draw_at_tap(sampling: Sampling, key: jax.Array, tap: Tap, passes: Passes) -> jax.Array:
  """Tangents [K, *scan, B, ...] for a tap, or [K, *scan, 1, ...] if shared by the batch.

  Each index of the axes that the tap shares with the losses (example, patch, group) has its own
  set.
  """
  batch, *rest = tap.shape[tap.scanned :]
  own = rest[: max(tap.local_axes, 1) - 1]
  d = math.prod(rest) // math.prod(own)
  law = distributions.as_law(sampling.law)
  one = lambda k: law.draw(k, passes, tuple(own), d, tap.dtype).reshape(-1, *rest)
  if sampling.shared:
    draw = lambda k: one(k)[:, None]
  else:
    ids_B = distributions.example_ids(batch, sampling.axis_name, sampling.part) // sampling.rows
    draw = lambda k: jax.vmap(one, out_axes=1)(distributions.fold_in_all(k, ids_B))
  for _ in range(tap.scanned):
    draw = jax.vmap(draw, out_axes=1)
  return draw(jax.random.split(key, tap.shape[: tap.scanned]) if tap.scanned else key)


def credit(tap: Tap, dL: Losses, axis_name: str | None = None) -> jax.Array:
  """dL summed over the losses that the tapped activity influences, in a matching shape.

  An activity that shares `local_axes` leading axes with the losses influences the entries at its
  own indices; with 0 (batch norm), the losses of the whole global batch.
  """

  def one(d: jax.Array) -> jax.Array:
    summed = d.sum(tuple(range(tap.local_axes, d.ndim)))
    return summed.reshape(summed.shape + (1,) * (tap.ndim - summed.ndim))

  influenced = functools.reduce(jnp.add, [one(d) for d in jax.tree.leaves(dL)])
  is_global = tap.local_axes == 0 and axis_name
  return jax.lax.psum(influenced, axis_name) if is_global else influenced

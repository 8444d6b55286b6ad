"""Activity perturbation: tangents at the taps (equation 4 of the paper)."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import GradFn, Losses, LossFn, PyTree
from lfg_jax.estimators.control_variates import (
  ControlVariate,
  Learned,
  corrected,
  cotangents,
  regression,
)
from lfg_jax.estimators.feedback import reverse_with_signals
from lfg_jax.jaxpr.tapped import Tapped, perturb, record
from lfg_jax.jaxpr.taps import Tap
from lfg_jax.promotion import upcast
from lfg_jax.tangents import distributions
from lfg_jax.tangents.derivatives import Derivative, along_each, jvp_derivative
from lfg_jax.tangents.distributions import Chunk
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
  joint: bool = True,
  num_tangents_of: Callable[[str], int] | None = None,
  is_perturbed: Names = lambda name: True,
  control_variate: ControlVariate | None = None,
  has_control_variate: Names = lambda name: True,
  redraw: bool = False,
  trace: Callable[..., Tapped] = Tapped,
) -> GradFn:
  """g_a(w_ij) = x_i (∇z·u) u_j, with z the activity at a tap.

  The signal of each tapped activity is u times the loss's derivative along u. The layers before
  the tap are then differentiated locally. That step is linear in the signals, so K tangents cost K
  forward derivatives and one local one.

  *Joint or one by one.* If all taps are perturbed at once, the derivative is Σ_j g_j·u_j over
  taps j, and the estimate at tap i has the squared error excess(d_i, K) |g_i|² + (d_i/K) Σ_{j≠i}
  |g_j|² (see `distributions`, "Blocks"). If each tap is perturbed separately, only the first term
  remains, and orthogonal distributions with K = d_i are exact. The price is one derivative of the
  computation after every tap, instead of one after the first. After the last tap of a block, no
  matrix product remains.

  *Which taps.* A tap that is not perturbed is transparent: the exact cotangent passes through it,
  and reverse mode reaches back to the perturbed taps before it. After the last tap of a block with
  a local loss, only a norm, a ReLU and the head remain, and the head learns from its exact
  gradient in the paper too.

  *Control variates* of the derivatives remove noise and add no bias: see `control_variates`.

  Args:
    learned: a control variate that learns; aux then holds its gradient as 'control_variate_gradient'.
    sampling: for every tap; `combine='projection'` needs `joint=False`.
    derivative: `jvp_derivative` or `finite_difference(ε)`.
    joint: whether to perturb all taps at once, or each by itself. (The taps of scanned layers are
      one tap.)
    num_tangents_of: with `joint=False`, a function from a tap's name to its number of tangents;
      default: that of `sampling`. `variance.allocate` finds good numbers.
    is_perturbed: which taps to perturb, by name; the others let the exact signal pass.
    control_variate: with `joint=False`, another control variate of the taps' gradients.
    has_control_variate: the taps that `learned` control variates, by name.
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
  check_options(sampling, joint, bool(num_tangents_of), bool(control_variate or learned))

  def own_sampling(name: str) -> Sampling:
    return sampling._replace(num_tangents=num_tangents_of(name)) if num_tangents_of else sampling

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, dict], PyTree]:
    tapped, key = trace(fun, params, *args), tangent_key(key)
    taps = tapped.taps
    keys = dict(zip(taps, jax.random.split(key, max(len(taps), 1)), strict=False))
    perturbed = {name: tap for name, tap in taps.items() if is_perturbed(name)}
    if sampling.shared:
      _check_shared(perturbed)
    # Control variates are made before any tangent is drawn, and without the key: an estimate stays
    # unbiased only if they do not depend on the tangents.
    control_variates: dict[str, jax.Array] = {}
    pull: Callable | None = None
    if learned:
      names = [name for name in perturbed if has_control_variate(name)]
      control_variates, pull = jax.vjp(
        lambda weights: cotangents(learned, weights, names, params, *args), learned.weights
      )
    elif control_variate:
      control_variates = dict(control_variate(tapped.evaluate(record, {}, params, *args)[1]))
    _check_control_variates(control_variates, perturbed)

    def evaluate(u: Mapping[str, jax.Array]) -> Losses:
      return tapped.evaluate(perturb, u, params, *args)[0][0]

    # First, the losses' derivatives along the tangents of each group of taps. Tangents are drawn
    # here from keys that XLA cannot identify with those below, or it would keep all of them.
    together = [list(perturbed)] if joint else [[name] for name in perturbed]
    early = {name: after(key, None) for name, key in keys.items()} if redraw else keys
    slopes: dict[str, Losses] = {}
    for names in filter(None, together):
      own_taps = {name: taps[name] for name in names}
      own = _slopes(evaluate, derivative, own_sampling(names[0]), own_taps, early)
      slopes |= dict.fromkeys(names, own)

    # Then the signals, from the last tap to the first, as the reverse sweep needs them. The same
    # tangents are drawn again; a tap's key waits for the signal of the tap after it, so only one
    # tap's tangents are in memory.
    residual: dict[str, jax.Array] = {}
    before: PyTree = slopes
    for name in reversed(perturbed):
      again = after(keys[name], before) if redraw else keys[name]
      before = residual[name] = _signal(
        own_sampling(name), taps[name], again, slopes[name], control_variates.get(name)
      )
    signal = {
      name: corrected(control_variates[name], r) if name in control_variates else r
      for name, r in residual.items()
    }
    (losses, aux), grads = reverse_with_signals(tapped, signal, params, *args)
    if learned and pull:
      known = {name: r for name, r in residual.items() if name in control_variates}
      aux = {
        **aux,
        'control_variate_gradient': regression(pull, control_variates, known, taps, learned.size_B),
      }
    return (losses, aux), grads

  return run


def check_options(
  sampling: Sampling, joint: bool, has_own_num_tangents: bool, has_control_variate: bool
) -> None:
  """Raises ValueError for options of `activity_perturbation` that contradict each other."""
  sampling.check()
  if sampling.combine == 'projection' and joint:
    raise ValueError('a projection takes the taps one by one; allowed: joint=False')
  if has_control_variate and joint:
    raise ValueError(
      "a control variate is of one tap's derivative, not of the sum over taps; allowed: joint=False"
    )
  if has_own_num_tangents and joint:
    raise ValueError(
      'taps have numbers of tangents of their own only where they are perturbed one '
      'by one; allowed: joint=False'
    )


def _check_shared(taps: Mapping[str, Tap]) -> None:
  for name, tap in taps.items():
    if tap.local_axes == 0:
      raise ValueError(
        f'tap {name!r} influences the losses of other examples, and one tangent for '
        'the whole batch cannot tell the examples apart; allowed: shared=False, an independent '
        'one for every example'
      )


def _check_control_variates(
  control_variates: Mapping[str, jax.Array], taps: Mapping[str, Tap]
) -> None:
  shapes = {name: tap.shape for name, tap in taps.items()}
  for name, h in control_variates.items():
    if shapes.get(name) != h.shape:
      raise ValueError(f'the control variate has {h.shape} for the tap {name!r}; allowed: {shapes}')


def _slopes(
  evaluate: Callable,
  derivative: Derivative,
  sampling: Sampling,
  taps: Mapping[str, Tap],
  keys: Mapping[str, jax.Array],
) -> Losses:
  """Derivatives [K, ...] of the losses along tangents at jointly perturbed taps."""

  def draw(chunk: Chunk) -> dict[str, jax.Array]:
    return {name: draw_at_tap(sampling, keys[name], tap, chunk) for name, tap in taps.items()}

  shapes = jax.eval_shape(lambda: draw(Chunk(1)))
  at_rest = {name: jnp.zeros(u.shape[1:], u.dtype) for name, u in shapes.items()}
  along = derivative(evaluate, at_rest, sampling.at_once < sampling.num_tangents)
  return each_chunk(lambda chunk: along_each(along, draw(chunk)), sampling)


def _signal(
  sampling: Sampling, tap: Tap, key: jax.Array, slopes: Losses, h: jax.Array | None
) -> jax.Array:
  """The estimate of a tap's gradient minus its control variate, from the slopes along its tangents."""

  def part(chunk: Chunk) -> jax.Array:
    u_K = draw_at_tap(sampling, key, tap, chunk)
    dL_K = jax.tree.map(lambda d: chunk.of(d), slopes)
    slope_K = jax.vmap(lambda dL: credit(tap, dL, sampling.axis_name))(dL_K)
    front = (1,) * (u_K.ndim - slope_K.ndim)
    slope_K = slope_K.reshape(slope_K.shape[0], *front, *slope_K.shape[1:])
    if h is not None:
      slope_K = slope_K - _control_variate_slope(tap, h, u_K, sampling.axis_name)
    own_axes = tap.ndim - max(tap.local_axes, 1)
    return combine(sampling.combine, slope_K, u_K, sampling.num_tangents, own_axes)

  return jnp.broadcast_to(sum_over_chunks(part, sampling), tap.shape)


def _control_variate_slope(
  tap: Tap, h: jax.Array, u_K: jax.Array, axis_name: str | None
) -> jax.Array:
  """h·u of each tangent, [K, *1, B, ...], summed over the axes that the tap's credit covers."""
  axes = (*range(1, 1 + tap.scanned), *range(1 + tap.scanned + tap.local_axes, u_K.ndim))
  dot_K = (upcast(h)[None] * upcast(u_K)).sum(axes, keepdims=True)
  return jax.lax.psum(dot_K, axis_name) if tap.local_axes == 0 and axis_name else dot_K


def draw_at_tap(sampling: Sampling, key: jax.Array, tap: Tap, chunk: Chunk) -> jax.Array:
  """Tangents [K, *scan, B, ...] for a tap, or [K, *scan, 1, ...] if shared by the batch.

  Each index of the axes that the tap shares with the losses (example, patch, group) has its own
  set.
  """
  batch, *rest = tap.shape[tap.scanned :]
  own = rest[: max(tap.local_axes, 1) - 1]
  d = math.prod(rest) // math.prod(own)
  distribution = distributions.as_distribution(sampling.distribution)

  def one(key: jax.Array) -> jax.Array:
    return distribution.draw(key, chunk, tuple(own), d, tap.dtype).reshape(-1, *rest)

  if sampling.shared:
    draw = lambda k: one(k)[:, None]
  else:
    ids_B = (
      distributions.example_ids(batch, sampling.axis_name, sampling.microbatch) // sampling.rows
    )
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

"""Gradient estimators, all with one signature.

    (losses, aux), grads = estimator(loss_fn)(params, key, *args)

close to `jax.value_and_grad(loss_fn, has_aux=True)`. The objective is the *sum* of all entries of `losses`
(the loss function multiplies each example's by its weight, 1/B for a mean); an array rather than a scalar,
`[B, P, G]` or any shape with examples first, because an estimator credits a perturbation with just those
entries that it can influence.

A `loss_fn(params, collections, *args) -> (losses, aux)` evaluates a model whose activities are marked by
`lfg_jax.estimators.taps`; `flax_loss` makes one of a Flax module. Rules that do not use taps hand it no collections.
"""

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lfg_jax.estimators import tangents
from lfg_jax.estimators.guesses import Guess, Known, Path, corrected, regression
from lfg_jax.estimators.passes import Sampling, combine, jvp_derivative, sum_over_chunks
from lfg_jax.estimators.tangents import Passes
from lfg_jax.estimators.taps import Tap

PyTree = Any
Losses = Any  # a pytree of arrays, examples on the first axis
GradFn = Callable[..., tuple[tuple[Losses, Any], PyTree]]


class LossFn(Protocol):
  """A differentiable loss; `record` evaluates it for what the module sows in one collection."""

  @property
  def guess_weights(self) -> PyTree:
    """What a guess of the taps' gradients has learned so far; {} for others."""

  @property
  def size_B(self) -> jax.Array | None:
    """By which a learned guess divides the examples' squared errors; None: 1."""

  def __call__(self, params: PyTree, collections: Mapping[str, PyTree], *args: Any) -> tuple[Losses, Any]: ...

  def record(self, collection: str, params: PyTree, *args: Any, given: Mapping[str, PyTree] = ...) -> PyTree: ...


class FlaxLoss(NamedTuple):
  """`apply(variables, mutable, *args) -> ((losses, aux), updated variables)` as a `LossFn`.

  `mutable` names the collections the module may write; the updates, without those of `record`, join `aux`.

  Attributes:
    guess_weights: of a learned guess; see `guesses`.
  """
  apply: Callable[..., tuple[tuple[Losses, dict], dict]]
  guess_weights: PyTree = {}    # noqa: RUF012    (never changed)
  size_B: jax.Array | None = None

  def __call__(self, params: PyTree, collections: Mapping[str, PyTree], *args: Any) -> tuple[Losses, dict]:
    (losses, aux), updates = self.apply({'params': params, **collections}, ('batch_stats',), *args)
    return losses, {**aux, **updates}

  def record(self, collection: str, params: PyTree, *args: Any,
             given: Mapping[str, PyTree] = types.MappingProxyType({})) -> PyTree:
    _, updates = self.apply({'params': params, **given}, ('batch_stats', collection), *args)
    return updates.get(collection, {})


def total(losses: Losses) -> jax.Array:
  """The objective: the sum of all entries."""
  return sum((leaf.sum() for leaf in jax.tree.leaves(losses)), jnp.float32(0))


def backprop(loss_fn: LossFn) -> GradFn:
  """The exact gradient, by `jax.value_and_grad`. (With fixed feedback matrices in the model: feedback alignment.)"""
  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    del key
    def objective(params: PyTree) -> tuple[jax.Array, tuple[Losses, Any]]:
      losses, aux = loss_fn(params, {}, *args)
      return total(losses), (losses, aux)
    (_, out), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return out, grads
  return run


# --- weight perturbation -------------------------------------------------------------------------------------


def weight_perturbation(loss_fn: LossFn, *, sampling: Sampling = Sampling(), derivative: Callable = jvp_derivative,
                        is_exact: Callable[[tuple], bool] = lambda path: False,
                        group_axis: Callable[[tuple], int | None] = lambda path: None) -> GradFn:
  """g_w(θ) = (∇θ·v) v (equation 3 of the paper), with local losses if the loss array has them.

  Unbiased when every weight is credited with all the losses that it influences.

  Args:
    sampling: `shared=False` draws one weight tangent per example (memory: B copies of the weights; losses of
      one example must not depend on others).
    derivative: `jvp_derivative` or `finite_difference(ε)`.
    is_exact: paths of parameters that no tap or tangent serves because a loss is linear-regressed on
      them directly (heads, read-out): they get their exact gradient.
    group_axis: for a parameter's path, the axis that runs over the G groups (or G equal chunks) each of
      which influences the losses `[B, P, g]` of its own group only; None: all losses.
  """
  def shared_run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    exact = [is_exact(path) for path, _ in paths_leaves]

    def merge(moved: list, fixed: list) -> PyTree:
      moving, staying = iter(moved), iter(fixed)
      return jax.tree.unflatten(treedef, [next(staying) if e else next(moving) for e in exact])

    moving = [leaf for (_, leaf), e in zip(paths_leaves, exact, strict=True) if not e]
    staying = [leaf for (_, leaf), e in zip(paths_leaves, exact, strict=True) if e]
    axes = [group_axis(path) for (path, _), e in zip(paths_leaves, exact, strict=True) if not e]
    losses, aux = loss_fn(params, {}, *args)
    along = derivative(lambda moved, extra: loss_fn(merge(moved, staying), extra, *args)[0],
                       lambda: loss_fn.record('held', params, *args), moving, sampling.at_once < sampling.passes)

    def part(passes: Passes) -> list[jax.Array]:
      v_K = tangents.like_tree(sampling.law, key, moving, passes)
      dL_K = jax.vmap(along)(v_K)
      return [combine('mean', _credit_weight(dL_K, v, axis), v, sampling.passes)
              for v, axis in zip(v_K, axes, strict=True)]

    estimates = sum_over_chunks(part, sampling)
    exact_grads = jax.grad(lambda s: total(loss_fn(merge(moving, s), {}, *args)[0]))(staying)
    return (losses, aux), merge(estimates, exact_grads)

  def per_example_run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    batch = jax.tree.leaves(args)[0].shape[0]
    keys_B = tangents.fold_in_all(key, tangents.example_ids(batch, sampling.axis_name, sampling.part))
    one = lambda k, *example: shared_run(params, k, *jax.tree.map(lambda x: x[None], example))
    (losses, aux), grads_B = jax.vmap(one)(keys_B, *args)
    squeeze = functools.partial(jax.tree.map, lambda x: x.reshape(batch, *x.shape[2:]))
    return (squeeze(losses), squeeze(aux)), jax.tree.map(lambda g: g.sum(0), grads_B)

  return shared_run if sampling.shared else per_example_run


def _credit_weight(dL_K: Losses, v: jax.Array, axis: int | None) -> jax.Array:
  """dL, summed over what the weight influences, in a shape that broadcasts with v [K, ...]."""
  K = v.shape[0]
  if axis is None:
    return sum(d.reshape(K, -1).sum(-1) for d in jax.tree.leaves(dL_K)).reshape(K, *[1] * (v.ndim - 1))
  (dL_KxBxPxG,) = jax.tree.leaves(dL_K)
  dL_KxG = dL_KxBxPxG.sum((1, 2))
  if dL_KxG.shape[1] > 1:  # 1: losses are not cut by group
    dL_KxG = jnp.repeat(dL_KxG, v.shape[1 + axis] // dL_KxG.shape[1], axis=1)
  return dL_KxG.reshape(K, *[-1 if a == axis else 1 for a in range(v.ndim - 1)])


# --- activity perturbation -----------------------------------------------------------------------------------


def activity_perturbation(loss_fn: LossFn, *, sampling: Sampling = Sampling(), derivative: Callable = jvp_derivative,
                          separate: bool = False, tap_passes: Mapping[str, int] | None = None,
                          is_perturbed: Callable[[Path], bool] = lambda path: True, guess: Guess | None = None
                          ) -> GradFn:
  """g_a(w_ij) = x_i (∇z·u) u_j (equation 4 of the paper): tangents at the taps.

  The loss's derivative along u, times u, is each tapped activity's signal; layers before the tap are then
  differentiated locally. Signals are linear in that step, so K passes cost K forward derivatives and one local one.

  *Joint or separate.* With the tangents of all taps in one pass, the derivative is Σ_j g_j·u_j over taps j, and the
  estimate of tap i has the squared error excess(d_i, K) |g_i|² + (d_i/K) Σ_{j≠i} |g_j|² (see `tangents`, "Blocks").
  Propagated by itself, a tap keeps the first term only, and orthogonal laws with K = d_i are exact. It costs a
  derivative of what lies behind every tap, instead of one of what lies behind the first; behind the last tap of a
  block lies no matrix product.

  *Which taps.* A tap that is not perturbed is transparent: the reverse sweep's own cotangent passes through it. That
  is exact, and reverse mode then reaches as far as to the perturbed taps before it. Behind the last tap of a block with
  a local loss lie a norm, a ReLU and the head, of which the last is learnt from its exact gradient in the paper too.

  *Guesses* of what the derivatives will say take noise out, and add no bias: see `guesses`.

  Args:
    sampling: of every tap; `combine='projection'` takes taps one by one.
    derivative: `jvp_derivative` or `finite_difference(ε)`.
    separate: whether each tap is perturbed by itself. (The taps of scanned layers are one tap.)
    tap_passes: with `separate`, numbers of passes for taps of these names; others have `sampling.passes`.
      `variance.allocate` finds good ones.
    is_perturbed: of a tap's path; the others let the exact signal pass.
    guess: with `separate`, guesses of taps' gradients. What it learns from is in aux as 'guess_gradient'.
  """
  check_activity_options(sampling, separate, tap_passes, guess)

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    taps = flatten_dict(jax.eval_shape(lambda p: loss_fn.record('taps', p, *args), params))
    keys = dict(zip(taps, jax.random.split(key, max(len(taps), 1)), strict=False))
    perturbed = [path for path in taps if is_perturbed(path)]
    # Before any tangent is drawn, and without the key.
    guessed, pull = _guess(guess, loss_fn, params, {path: taps[path] for path in perturbed}, args)
    evaluate = lambda u, extra: loss_fn(params, {'perturbation': unflatten_dict(u), **extra}, *args)[0]
    held = lambda: loss_fn.record('held', params, *args)
    residual = {}
    for paths in [[path] for path in perturbed] if separate else [perturbed]:
      own = sampling._replace(passes=(tap_passes or {}).get(paths[0][-1], sampling.passes)) if separate else sampling
      own_taps = {path: taps[path] for path in paths}
      residual.update(_signals(evaluate, held, derivative, own, own_taps, keys, guessed))
    signal = {path: corrected(guessed[path], r) if path in guessed else r for path, r in residual.items()}
    (losses, aux), grads = reverse_with_signals(loss_fn, params, unflatten_dict(signal), *args)
    if guess:
      known_residual = {path: r for path, r in residual.items() if path in guessed}
      aux = {**aux, 'guess_gradient': regression(pull, guessed, known_residual, taps, loss_fn.size_B)}
    return (losses, aux), grads
  return run


def check_activity_options(sampling: Sampling, separate: bool, tap_passes: Mapping[str, int] | None,
                           guess: Callable | None) -> None:
  """Raises ValueError for options of `activity_perturbation` that make no sense together."""
  for passes in (sampling.passes, *(tap_passes or {}).values()):
    sampling._replace(passes=passes).check()
  if sampling.combine == 'projection' and not separate:
    raise ValueError("combine='projection' takes the taps one by one; allowed: taps 'separate'")
  if guess and not separate:
    raise ValueError("a guess is of one tap's derivative, not of the sum over taps; allowed: taps 'separate'")


def _guess(guess: Guess | None, loss_fn: LossFn, params: PyTree, taps: dict[Path, Tap], args: tuple
           ) -> tuple[dict[Path, jax.Array], Callable]:
  """The guess's signals, and their transposed derivative by its weights."""
  if guess is None:
    return {}, lambda _: ({},)
  values = flatten_dict(loss_fn.record('taps', params, *args))
  guessed, pull = jax.vjp(lambda weights: dict(guess(weights, Known(loss_fn, params, values, args))),
                          loss_fn.guess_weights)
  for path, h in guessed.items():
    if path not in taps or h.shape != taps[path].value.shape:
      raise ValueError(f'the guess has {h.shape} for the tap {path}; allowed: '
                       f'{ {path: tap.value.shape for path, tap in taps.items()} }')
  return guessed, pull


def _signals(evaluate: Callable, held: Callable, derivative: Callable, sampling: Sampling, taps: dict[Path, Tap],
             keys: dict[Path, jax.Array], guessed: Mapping[Path, jax.Array]) -> dict[Path, jax.Array]:
  """Estimates, for taps that are perturbed together, of their gradients less what was guessed."""
  draw = lambda passes: {path: draw_at_tap(sampling, keys[path], tap, passes) for path, tap in taps.items()}
  rest = {path: jnp.zeros(u.shape[1:], u.dtype) for path, u in jax.eval_shape(lambda: draw(Passes(1))).items()}
  along = derivative(evaluate, held, rest, sampling.at_once < sampling.passes)

  def part(passes: Passes) -> dict[Path, jax.Array]:
    u_K = draw(passes)
    dL_K = jax.vmap(along)(u_K)

    def signal(path: Path, tap: Tap, u_K: jax.Array) -> jax.Array:
      slope_K = jax.vmap(lambda dL: credit(tap, dL, sampling.axis_name))(dL_K)
      slope_K = slope_K.reshape(slope_K.shape[0], *[1] * (u_K.ndim - slope_K.ndim), *slope_K.shape[1:])
      if path in guessed:
        slope_K = slope_K - _guessed_slope(tap, guessed[path], u_K, sampling.axis_name)
      return combine(sampling.combine, slope_K, u_K, sampling.passes, tap.ndim - max(tap.local_axes, 1))
    return {path: signal(path, tap, u_K[path]) for path, tap in taps.items()}

  total = sum_over_chunks(part, sampling)
  return {path: jnp.broadcast_to(total[path], tap.value.shape) for path, tap in taps.items()}


def _guessed_slope(tap: Tap, guessed: jax.Array, u_K: jax.Array, axis_name: str | None) -> jax.Array:
  """h·u of each tangent, [K, *1, B, ...]: over all that the tap's credit sums over."""
  scanned = guessed.ndim - tap.ndim
  axes = (*range(1, 1 + scanned), *range(1 + scanned + tap.local_axes, u_K.ndim))
  dot_K = (guessed.astype(jnp.float32)[None] * u_K).sum(axes, keepdims=True)
  return jax.lax.psum(dot_K, axis_name) if tap.local_axes == 0 and axis_name else dot_K


class _UpToBoundary(NamedTuple):
  """The losses s·y, with y what arrives at the boundary and s fixed: their derivatives are those of the true losses.

  Attributes:
    signal: s, a tree of the collection 'boundary'.
    shape: of the true losses, [B, P, G]; an axis of size 1 is one that y's parts are summed over.
  """
  loss_fn: LossFn
  signal: PyTree
  shape: tuple[int, ...]

  @property
  def guess_weights(self) -> PyTree:
    return self.loss_fn.guess_weights

  @property
  def size_B(self) -> jax.Array:
    """|s|² of every example."""
    return _sum([jnp.square(_float32(s)).sum(tuple(range(1, s.ndim))) for s in jax.tree.leaves(self.signal)])

  def __call__(self, params: PyTree, collections: Mapping[str, PyTree], *args: Any) -> tuple[jax.Array, dict]:
    taps = self.loss_fn.record('boundary', params, *args, given=collections)

    def one(tap: Tap, s: jax.Array) -> jax.Array:
      dot = (_float32(s) * _float32(tap.value)).sum(tuple(range(tap.local_axes, tap.ndim)))
      uncut = tuple(axis for axis, size in enumerate(self.shape) if size == 1)
      return dot.sum(uncut, keepdims=True) if uncut else dot
    return _sum(jax.tree.leaves(jax.tree.map(one, taps, self.signal, is_leaf=_is_tap))), {}

  def record(self, collection: str, params: PyTree, *args: Any, given: Mapping[str, PyTree] = types.MappingProxyType({})
             ) -> PyTree:
    return self.loss_fn.record(collection, params, *args, given=given)


def exact_behind_boundary(loss_fn: LossFn, *, estimator: Callable[[LossFn], GradFn]) -> GradFn:
  """Another estimator up to the boundary that the model marks (`taps.boundary`), the exact gradient behind it.

  Reverse mode goes from the losses to the boundary, and gives the exact signal s = ∂L/∂y there. As everything
  before influences the losses through y alone, the derivative of the losses along any tangent is s·dy: the
  estimator's forward derivatives end at the boundary too, which saves what lies behind.
  """
  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    def objective(params: PyTree, shift: PyTree) -> tuple[jax.Array, tuple[Losses, Any]]:
      losses, aux = loss_fn(params, {'boundary_shift': shift}, *args)
      return total(losses), (losses, aux)

    taps = jax.eval_shape(lambda p: loss_fn.record('boundary', p, *args), params)
    zeros = jax.tree.map(lambda tap: jnp.zeros(tap.value.shape, tap.value.dtype), taps, is_leaf=_is_tap)
    (_, (losses, aux)), (behind, signal) = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, zeros)
    (_, own_aux), before = estimator(_UpToBoundary(loss_fn, signal, losses.shape))(params, key, *args)
    return (losses, {**aux, **own_aux}), jax.tree.map(jnp.add, behind, before)
  return run


def _sum(arrays: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, arrays)


def _float32(x: jax.Array) -> jax.Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def direct_feedback(loss_fn: LossFn, *, matrices: PyTree) -> GradFn:
  """Direct feedback alignment (Nøkland 2016): each tap's signal is the output error times a fixed matrix.

  Args:
    matrices: for every tap of shape [*scan, B, ...] an array [*scan, K, ...]. The loss function's aux holds
      `output_error`, [B, K]: the derivative of the objective with respect to the model's output.
  """
  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    del key
    taps = jax.eval_shape(lambda p: loss_fn.record('taps', p, *args), params)
    error_BxK = loss_fn(params, {}, *args)[1]['output_error']

    def signal(tap: Tap, matrix: jax.Array) -> jax.Array:
      project = lambda m: jnp.tensordot(error_BxK, m, 1)
      for _ in range(tap.value.ndim - tap.ndim):
        project = jax.vmap(project)
      return project(matrix)

    return reverse_with_signals(loss_fn, params, jax.tree.map(signal, taps, matrices, is_leaf=_is_tap), *args)
  return run


def reverse_with_signals(loss_fn: LossFn, params: PyTree, signal: PyTree, *args: Any
                         ) -> tuple[tuple[Losses, Any], PyTree]:
  """Gradients of every layer from its own tap's signal; see `lfg_jax.estimators.taps`."""
  def objective(params: PyTree) -> tuple[jax.Array, tuple[Losses, Any]]:
    losses, aux = loss_fn(params, {'signal': signal}, *args)
    return total(losses), (losses, aux)
  (_, out), grads = jax.value_and_grad(objective, has_aux=True)(params)
  return out, grads


def _is_tap(x: Any) -> bool:
  return isinstance(x, Tap)


def draw_at_tap(sampling: Sampling, key: jax.Array, tap: Tap, passes: Passes) -> jax.Array:
  """Tangents [K, *scan, B, ...] for a tap, or [K, *scan, 1, ...] when shared by the batch.

  Each index of the axes that the tap has in common with the losses (example, patch, group) has a set of its own.
  """
  scanned = tap.value.ndim - tap.ndim
  batch, *rest = tap.value.shape[scanned:]
  own = rest[:max(tap.local_axes, 1) - 1]
  d = math.prod(rest) // math.prod(own)
  one = lambda k: sampling.law.draw(k, passes, tuple(own), d, tap.value.dtype).reshape(-1, *rest)
  if sampling.shared:
    draw = lambda k: one(k)[:, None]
  else:
    ids_B = tangents.example_ids(batch, sampling.axis_name, sampling.part) // sampling.rows
    draw = lambda k: jax.vmap(one, out_axes=1)(tangents.fold_in_all(k, ids_B))
  for _ in range(scanned):
    draw = jax.vmap(draw, out_axes=1)
  return draw(jax.random.split(key, tap.value.shape[:scanned]) if scanned else key)


def credit(tap: Tap, dL: Losses, axis_name: str | None = None) -> jax.Array:
  """dL summed over the losses that the tapped activity influences, in a shape that broadcasts with it.

  An activity that shares `local_axes` leading axes with the losses influences the entries at its own indices;
  with none (batch norm), the losses of the whole global batch.
  """
  def one(d: jax.Array) -> jax.Array:
    summed = d.sum(tuple(range(tap.local_axes, d.ndim)))
    return summed.reshape(summed.shape + (1,) * (tap.ndim - summed.ndim))
  influenced = sum((one(d) for d in jax.tree.leaves(dL)), jnp.float32(0))
  return jax.lax.psum(influenced, axis_name) if tap.local_axes == 0 and axis_name else influenced

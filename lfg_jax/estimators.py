"""Gradient estimators, all with one signature.

    (losses, aux), grads = estimator(loss_fn)(params, key, *args)

close to `jax.value_and_grad(loss_fn, has_aux=True)`. The objective is the *sum* of all entries of `losses`
(the loss function multiplies each example's by its weight, 1/B for a mean); an array rather than a scalar,
`[B, P, G]` or any shape with examples first, because an estimator credits a perturbation with just those
entries that it can influence.

A `loss_fn(params, collections, *args) -> (losses, aux)` evaluates a model whose activities are marked by
`lfg_jax.taps`; `flax_loss` makes one of a Flax module. Rules that do not use taps hand it no collections.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lfg_jax import tangents
from lfg_jax.taps import Tap

PyTree = Any
Losses = Any  # a pytree of arrays, examples on the first axis
GradFn = Callable[..., tuple[tuple[Losses, Any], PyTree]]


class LossFn(Protocol):
  """A differentiable loss; `record` evaluates it for what the module sows in one collection."""

  def __call__(self, params: PyTree, collections: Mapping[str, PyTree], *args: Any) -> tuple[Losses, Any]: ...

  def record(self, collection: str, params: PyTree, *args: Any) -> PyTree: ...


class FlaxLoss(NamedTuple):
  """`apply(variables, mutable, *args) -> ((losses, aux), updated variables)` as a `LossFn`.

  `mutable` names the collections the module may write; the updates, without those of `record`, join `aux`.
  """
  apply: Callable[..., tuple[tuple[Losses, dict], dict]]

  def __call__(self, params: PyTree, collections: Mapping[str, PyTree], *args: Any) -> tuple[Losses, dict]:
    (losses, aux), updates = self.apply({'params': params, **collections}, ('batch_stats',), *args)
    return losses, {**aux, **updates}

  def record(self, collection: str, params: PyTree, *args: Any) -> PyTree:
    _, updates = self.apply({'params': params}, ('batch_stats', collection), *args)
    return updates.get(collection, {})


class Sampling(NamedTuple):
  """How tangents are drawn.

  Attributes:
    law: entries' law, from `tangents`.
    passes: number of tangents whose estimates are averaged; they share one primal evaluation.
    shared: one tangent for the whole batch, or an independent one for every example.
    axis_name: mesh axis the batch is sharded over, so that noise follows the example's global position.
    rows: so many consecutive rows of the batch share a tangent, as the two views of an example may.
  """
  law: tangents.Law = tangents.rademacher
  passes: int = 1
  shared: bool = False
  axis_name: str | None = None
  rows: int = 1


Derivative = Callable[[Callable, PyTree, PyTree], Losses]


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


def jvp_derivative(fn: Callable[[PyTree, PyTree], Losses], held: Callable[[], PyTree]) -> Callable:
  """`(x, v) -> dL`, the exact derivative of every loss along v, by `jax.jvp`."""
  del held
  return lambda x, v: jax.jvp(lambda x: fn(x, {}), (x,), (v,))[1]


def finite_difference(step: float = 1e-3) -> Callable:
  """Derivatives as (L(x + εv) - L(x)) / ε, the classical baseline."""
  def derivative(fn: Callable[[PyTree, PyTree], Losses], held: Callable[[], PyTree]) -> Callable:
    def along(x: PyTree, v: PyTree) -> Losses:
      moved = jax.tree.map(lambda x, v: x + step * v, x, v)
      collections = {'held': held()}
      difference = jax.tree.map(jnp.subtract, fn(moved, collections), fn(x, collections))
      return jax.tree.map(lambda d: d / step, difference)
    return along
  return derivative


def _over_passes(along: Callable, x: PyTree, v_K: PyTree) -> Losses:
  """dL [K, ...] along each of the K tangents; what does not depend on the tangent is computed once."""
  return jax.vmap(along, (None, 0))(x, v_K)


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
                       lambda: loss_fn.record('held', params, *args))
    v_K = jax.vmap(lambda k: tangents.like_tree(sampling.law, k, moving))(jax.random.split(key, sampling.passes))
    dL_K = _over_passes(along, moving, v_K)
    estimates = [jnp.mean(_credit_weight(dL_K, v, axis) * v, 0) for v, axis in zip(v_K, axes, strict=True)]
    exact_grads = jax.grad(lambda s: total(loss_fn(merge(moving, s), {}, *args)[0]))(staying)
    return (losses, aux), merge(estimates, exact_grads)

  def per_example_run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    batch = jax.tree.leaves(args)[0].shape[0]
    keys_B = tangents.fold_in_all(key, tangents.example_ids(batch, sampling.axis_name))
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


def activity_perturbation(loss_fn: LossFn, *, sampling: Sampling = Sampling(),
                          derivative: Callable = jvp_derivative) -> GradFn:
  """g_a(w_ij) = x_i (∇z·u) u_j (equation 4 of the paper): tangents at the taps, all at once.

  The loss's derivative along u, times u, is each tapped activity's signal; layers before the tap are then
  differentiated locally. Signals are linear in that step, so K passes cost K forward derivatives and one local one.
  """
  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, Any], PyTree]:
    taps = jax.eval_shape(lambda p: loss_fn.record('taps', p, *args), params)
    u_K = jax.vmap(lambda k: draw_at_taps(sampling, k, taps))(jax.random.split(key, sampling.passes))
    along = derivative(lambda u, extra: loss_fn(params, {'perturbation': u, **extra}, *args)[0],
                       lambda: loss_fn.record('held', params, *args))
    rest = jax.tree.map(lambda u: jnp.zeros(u.shape[1:], u.dtype), u_K)
    dL_K = _over_passes(along, rest, u_K)
    credit_K = lambda t: jax.vmap(lambda dL: credit(t, dL, sampling.axis_name))(dL_K)
    signal = jax.tree.map(lambda t, u: jnp.mean(credit_K(t) * u, 0), taps, u_K, is_leaf=_is_tap)
    return reverse_with_signals(loss_fn, params, _match(signal, taps), *args)
  return run


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
  """Gradients of every layer from its own tap's signal; see `lfg_jax.taps`."""
  def objective(params: PyTree) -> tuple[jax.Array, tuple[Losses, Any]]:
    losses, aux = loss_fn(params, {'signal': signal}, *args)
    return total(losses), (losses, aux)
  (_, out), grads = jax.value_and_grad(objective, has_aux=True)(params)
  return out, grads


def _is_tap(x: Any) -> bool:
  return isinstance(x, Tap)


def _match(signal: PyTree, taps: PyTree) -> PyTree:
  """Signals of the taps' full shape (a shared perturbation has one example)."""
  return jax.tree.map(lambda t, s: jnp.broadcast_to(s, t.value.shape), taps, signal, is_leaf=_is_tap)


def draw_at_taps(sampling: Sampling, key: jax.Array, taps: PyTree) -> PyTree:
  """A tangent for every tap, [*scan, B, ...], or [*scan, 1, ...] when shared by the batch."""
  leaves, treedef = jax.tree.flatten(taps, is_leaf=_is_tap)
  keys = jax.random.split(key, max(len(leaves), 1))
  return jax.tree.unflatten(treedef, [_draw_at_tap(sampling, k, t) for k, t in zip(keys, leaves, strict=False)])


def _draw_at_tap(sampling: Sampling, key: jax.Array, tap: Tap) -> jax.Array:
  scanned = tap.value.ndim - tap.ndim
  shape = tap.value.shape[scanned:]
  if sampling.shared:
    draw = lambda k: sampling.law.draw(k, (1, *shape[1:]), tap.value.dtype)
  else:
    ids_B = tangents.example_ids(shape[0], sampling.axis_name) // sampling.rows
    one = lambda k: sampling.law.draw(k, shape[1:], tap.value.dtype)
    draw = lambda k: jax.vmap(one)(tangents.fold_in_all(k, ids_B))
  keys = jax.random.split(key, tap.value.shape[:scanned]) if scanned else key
  for _ in range(scanned):
    draw = jax.vmap(draw)
  return draw(keys)


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

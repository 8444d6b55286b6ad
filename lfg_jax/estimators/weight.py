"""Weight perturbation: tangents in the space of the parameters (equation 3 of the paper)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import GradFn, Losses, LossFn, PyTree, total
from lfg_jax.tangents import distributions
from lfg_jax.tangents.derivatives import along_each, jvp_derivative
from lfg_jax.tangents.distributions import Chunk
from lfg_jax.tangents.sampling import Sampling, combine, sum_over_chunks, tangent_key


def weight_perturbation(
  fun: LossFn,
  *,
  sampling: Sampling = Sampling(),
  is_exact: Callable[[tuple], bool] = lambda path: False,
  group_axis: Callable[[tuple], int | None] = lambda path: None,
) -> GradFn:
  """g_w(θ) = (∇θ·v) v, with local losses if the loss array has them.

  It is unbiased if every weight is credited with all the losses that it influences.

  Args:
    sampling: `shared=False` draws one weight tangent per example (memory: B copies of the weights;
      losses of one example must not depend on others).
    is_exact: whether a parameter, by its path, gets its exact gradient. This is for heads and the
      read-out, single linear layers right below their loss.
    group_axis: for a parameter's path, the axis over the G groups (or G equal chunks), each of
      which influences only the losses `[B, P, g]` of its own group; None: all losses.

  >>> loss = lambda w, x: ((x @ w) ** 2, {})
  >>> exact = Sampling(distributions.hadamard, 2)    # as many orthogonal tangents as weights
  >>> estimate = weight_perturbation(loss, sampling=exact._replace(shared=True))
  >>> estimate(jnp.ones(2), jax.random.key(0), jnp.eye(2))[1].tolist()
  [2.0, 2.0]
  """

  sampling.check()

  def shared_run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, dict], PyTree]:
    key = tangent_key(key)
    paths_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    exact = [is_exact(path) for path, _ in paths_leaves]

    def merge(moved: list, fixed: list) -> PyTree:
      moving, staying = iter(moved), iter(fixed)
      return jax.tree.unflatten(treedef, [next(staying if e else moving) for e in exact])

    moving = [leaf for (_, leaf), e in zip(paths_leaves, exact, strict=True) if not e]
    staying = [leaf for (_, leaf), e in zip(paths_leaves, exact, strict=True) if e]
    axes = [group_axis(path) for (path, _), e in zip(paths_leaves, exact, strict=True) if not e]
    losses, aux = fun(params, *args)
    along = jvp_derivative(
      lambda moved: fun(merge(moved, staying), *args)[0],
      moving,
      sampling.at_once < sampling.num_tangents,
    )

    def part(chunk: Chunk) -> list[jax.Array]:
      v_K = distributions.like_tree(sampling.distribution, key, moving, chunk)
      dL_K = along_each(along, v_K)
      return [
        combine('mean', _credit(dL_K, v, axis), v, sampling.num_tangents)
        for v, axis in zip(v_K, axes, strict=True)
      ]

    estimates = sum_over_chunks(part, sampling)
    exact_grads = jax.grad(lambda s: total(fun(merge(moving, s), *args)[0]))(staying)
    return (losses, aux), merge(estimates, exact_grads)

  def per_example_run(
    params: PyTree, key: jax.Array, *args: Any
  ) -> tuple[tuple[Losses, dict], PyTree]:
    batch = jax.tree.leaves(args)[0].shape[0]
    keys_B = distributions.fold_in_all(
      tangent_key(key), distributions.example_ids(batch, sampling.axis_name, sampling.microbatch)
    )
    one = lambda k, *example: shared_run(params, k, *jax.tree.map(lambda x: x[None], example))
    (losses, aux), grads_B = jax.vmap(one)(keys_B, *args)
    squeeze = functools.partial(jax.tree.map, lambda x: x.reshape(batch, *x.shape[2:]))
    return (squeeze(losses), squeeze(aux)), jax.tree.map(lambda g: g.sum(0), grads_B)

  return shared_run if sampling.shared else per_example_run


def _credit(dL_K: Losses, v: jax.Array, axis: int | None) -> jax.Array:
  """dL, summed over the losses that the weight influences, in a shape that broadcasts with v."""
  K = v.shape[0]
  if axis is None:
    dL = sum(d.reshape(K, -1).sum(-1) for d in jax.tree.leaves(dL_K))
    return dL.reshape(K, *[1] * (v.ndim - 1))
  (dL_KxBxPxG,) = jax.tree.leaves(dL_K)
  dL_KxG = dL_KxBxPxG.sum((1, 2))
  if dL_KxG.shape[1] > 1:  # 1: losses are not cut by group
    dL_KxG = jnp.repeat(dL_KxG, v.shape[1 + axis] // dL_KxG.shape[1], axis=1)
  return dL_KxG.reshape(K, *[-1 if a == axis else 1 for a in range(v.ndim - 1)])

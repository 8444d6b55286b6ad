"""The signature that all gradient estimators share.

    (losses, aux), grads = estimator(fun)(params, key, *args)

is close to `jax.value_and_grad(fun, has_aux=True)(params, *args)`. `fun(params, *args)` returns
`(losses, aux)`, where aux is a dict. The objective is the *sum* of all entries of `losses`, which
already include each example's weight (1/B for a mean). `losses` is an array, `[B, P, G]` or any
shape with examples first, rather than a scalar, because an estimator credits a perturbation only
with the entries that it can influence.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Losses = Any  # a pytree of arrays, examples on the first axis
LossFn = Callable[..., tuple[Losses, dict[str, Any]]]
GradFn = Callable[..., tuple[tuple[Losses, dict[str, Any]], PyTree]]


def total(losses: Losses) -> jax.Array:
  """The objective: the sum of all entries.

  >>> total((jnp.ones(3), jnp.ones((3, 2)))).item()
  9.0
  """
  return functools.reduce(jnp.add, [leaf.sum() for leaf in jax.tree.leaves(losses)])


def objective(fun: LossFn) -> Callable[..., tuple[jax.Array, tuple[Losses, dict[str, Any]]]]:
  """`fun` for `jax.value_and_grad(…, has_aux=True)`: the objective, and what `fun` returns."""

  def of_params(params: PyTree, *args: Any) -> tuple[jax.Array, tuple[Losses, dict[str, Any]]]:
    losses, aux = fun(params, *args)
    return total(losses), (losses, aux)

  return of_params

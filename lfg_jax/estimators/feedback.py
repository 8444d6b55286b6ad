"""Gradients by reverse mode: exact (backprop), or from signals injected at the taps."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators._types import GradFn, Losses, LossFn, PyTree, objective
from lfg_jax.jaxpr.tapped import Tapped, keep, replace_cotangent


def backprop(fun: LossFn) -> GradFn:
  """The exact gradient, by `jax.value_and_grad`.

  If the model's layers have fixed feedback matrices, this is feedback alignment.

  >>> loss = lambda w, x: ((x @ w) ** 2, {})
  >>> _, gradient = backprop(loss)(jnp.ones(2), jax.random.key(0), jnp.eye(2))
  >>> gradient.tolist()
  [2.0, 2.0]
  """

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, dict], PyTree]:
    del key
    (_, out), grads = jax.value_and_grad(objective(fun), has_aux=True)(params, *args)
    return out, grads

  return run


def reverse_with_signals(
  tapped: Tapped, signal: Mapping[str, jax.Array], params: PyTree, *args: Any
) -> tuple[tuple[Losses, dict], PyTree]:
  """Gradients of every layer from the signal at its own tap; see `taps`."""
  evaluate = lambda *args: tapped.evaluate(replace_cotangent, signal, *args)[0]
  (_, out), grads = jax.value_and_grad(objective(evaluate), has_aux=True)(params, *args)
  return out, grads


def direct_feedback(fun: LossFn, *, matrices: Mapping[str, jax.Array]) -> GradFn:
  """Direct feedback alignment (Nøkland 2016): a tap's signal is the output error times a matrix.

  Args:
    fun: its aux holds `output_error` [B, K], the objective's derivative with respect to the output.
    matrices: for every tap of shape [*scan, B, ...], a fixed array [*scan, K, ...].
  """

  def run(params: PyTree, key: jax.Array, *args: Any) -> tuple[tuple[Losses, dict], PyTree]:
    del key
    tapped = Tapped(fun, params, *args)
    (_, aux), _ = tapped.evaluate(keep, {}, params, *args)
    error_BxK = aux['output_error']

    def signal(name: str) -> jax.Array:
      project = lambda matrix: jnp.tensordot(error_BxK, matrix, 1)
      for _ in range(tapped.taps[name].scanned):
        project = jax.vmap(project)
      return project(matrices[name])

    return reverse_with_signals(tapped, {name: signal(name) for name in tapped.taps}, params, *args)

  return run

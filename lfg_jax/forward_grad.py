"""Forward gradients of any pure function: `forward_grad` and `value_and_forward_grad`, as `jax.grad` plus a key."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from lfg_jax import tangents
from lfg_jax.passes import Sampling, combine, sum_over_chunks
from lfg_jax.tangents import Passes

PyTree = Any


def value_and_forward_grad(fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, *,
                           law: tangents.Law = tangents.rademacher, passes: int = 1, chunk: int | None = None,
                           combination: str = 'mean') -> Callable:
  """`jax.value_and_grad` without a backward pass: the gradient's estimate (1/K) Σ_k (∇f·u_k) u_k from K derivatives.

  Unbiased, since E[u uᵀ] = I, with the squared error `law.excess(d, passes)` · |∇f|², where d is the number of all
  entries that are differentiated; exact for an orthogonal law with K = d. All tangents share one evaluation of
  `fun`. Memory is that of K evaluations, or of `chunk` of them and what one backward pass would keep.

  Replacing `jax.value_and_grad(loss)(params, batch)` by `value_and_forward_grad(loss)(params, batch, key=key)` is all
  that a training loop needs. It holds under jit, vmap, scan and shard_map. In shard_map, give every device the
  same key: the mean over devices of the estimates is then the estimate of the mean loss along common tangents.

  Args:
    fun: returns a scalar, or with `has_aux` a scalar and anything.
    argnums: which positional arguments (pytrees of real floating-point arrays) to differentiate.
    has_aux: see `jax.grad`; aux is that of the unperturbed evaluation.
    law: of the tangents, over all differentiated entries together.
    passes: number of tangents, K.
    chunk: how many are in memory at once (rounded down to a divisor of `passes`); None: all.
    combination: 'mean', or 'projection' on the tangents' span (too short by K/d: see `passes.combine`).

  Returns:
    `(*args, key, **kwargs) -> (value, gradient)`, or `((value, aux), gradient)`; gradients as `jax.grad` has them.

  Raises:
    ValueError: `fun` is not scalar, or an argument number is out of range.
    TypeError: an argument is not real floating-point.

  >>> f = lambda x: (x ** 2).sum()
  >>> law = tangents.hadamard
  >>> value, gradient = value_and_forward_grad(f, law=law, passes=4)(jnp.arange(4.), key=jax.random.key(0))
  >>> value.item(), gradient.tolist()
  (14.0, [0.0, 2.0, 4.0, 6.0])
  """
  sampling = Sampling(law, passes, chunk=chunk, combine=combination)
  sampling.check()

  def run(*args: Any, key: jax.Array, **kwargs: Any) -> tuple[Any, PyTree]:
    numbers = _positions(argnums, len(args))
    point = tuple(args[n] for n in numbers)
    _check_floating(point)

    def evaluate(point: tuple) -> tuple[jax.Array, Any]:
      replaced = dict(zip(numbers, point, strict=True))
      out = fun(*(replaced.get(n, arg) for n, arg in enumerate(args)), **kwargs)
      value, aux = out if has_aux else (out, None)
      if jnp.shape(value):
        raise ValueError(f'forward gradients are of scalar functions; the output has shape {jnp.shape(value)}')
      return jnp.asarray(value), aux

    value, aux, estimate = _estimate(evaluate, point, key, sampling)
    return ((value, aux) if has_aux else value), (estimate[0] if isinstance(argnums, int) else estimate)
  return run


def forward_grad(fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, **options: Any) -> Callable:
  """`jax.grad` by forward gradients: `value_and_forward_grad` (which explains the options) without the value.

  Returns:
    `(*args, key, **kwargs) -> gradient`, or `(gradient, aux)`.

  >>> gradient = forward_grad(lambda x, y: x * y, argnums=(0, 1))
  >>> [round(float(g), 3) for g in gradient(2., 3., key=jax.random.key(0))] in ([5., 5.], [1., -1.], [-1., 1.])
  True
  """
  with_value = value_and_forward_grad(fun, argnums, has_aux, **options)

  def run(*args: Any, key: jax.Array, **kwargs: Any) -> PyTree:
    value, gradient = with_value(*args, key=key, **kwargs)
    return (gradient, value[1]) if has_aux else gradient
  return run


def _estimate(evaluate: Callable, point: tuple, key: jax.Array, sampling: Sampling) -> tuple[jax.Array, Any, tuple]:
  """(value, aux, estimate). Tangents are drawn for all entries in a row: orthogonal ones are so in the whole."""
  flat_D, unravel = ravel_pytree(point)
  draw = lambda passes: sampling.law.draw(key, passes, (), flat_D.size, flat_D.dtype)
  mean = lambda slope_K, u_KxD: combine(sampling.combine, slope_K[:, None], u_KxD, sampling.passes)
  if sampling.at_once == sampling.passes:
    u_KxD = draw(Passes(sampling.passes))
    along = lambda u: jax.jvp(evaluate, (point,), (unravel(u),), has_aux=True)
    value, slope_K, aux = jax.vmap(along, out_axes=(None, 0, None))(u_KxD)
    return value, aux, unravel(mean(slope_K, u_KxD))

  value, linear, aux = jax.linearize(evaluate, point, has_aux=True)

  def part(passes: Passes) -> jax.Array:
    u_KxD = draw(passes)
    return mean(jax.vmap(lambda u: linear(unravel(u)))(u_KxD), u_KxD)
  return value, aux, unravel(sum_over_chunks(part, sampling))


def _positions(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
  numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
  for n in numbers:
    if not -count <= n < count:
      raise ValueError(f'argnums is {argnums!r}, but the function was called with {count} positional arguments')
  return tuple(n % count for n in numbers)


def _check_floating(point: tuple) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(point):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
      raise TypeError(f'forward gradients are of real floating-point inputs; argument {jax.tree_util.keystr(path)} '
                      f'has dtype {jnp.result_type(leaf)}')

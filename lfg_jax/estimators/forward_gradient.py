"""Forward gradients of any pure function: `forward_grad` and `value_and_forward_grad`.

They are like `jax.grad` and `jax.value_and_grad`, plus a key.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfg_jax.estimators._arguments import Static, bind, explained, with_aux
from lfg_jax.tangents import distributions
from lfg_jax.tangents.derivatives import Derivative, along_each, recomputed_jvp
from lfg_jax.tangents.distributions import Chunk
from lfg_jax.tangents.sampling import Sampling, combine, sum_over_chunks, tangent_key

PyTree = Any


def value_and_forward_grad(
  fun: Callable,
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  *,
  distribution: distributions.Distribution | str = distributions.rademacher,
  num_tangents: int = 1,
  chunk: int | None = None,
  combine: str = 'mean',
  derivative: Derivative | None = None,
) -> Callable:
  """`jax.value_and_grad` without a backward pass.

  The gradient's estimate is (1/K) Σ_k (∇f·u_k) u_k, from K forward derivatives. It is unbiased,
  since E[u uᵀ] = I. Its squared error is `distribution.excess(d, num_tangents)` · |∇f|², where d is the number of
  differentiated entries; with an orthogonal distribution and K = d, it is exact. Each leaf of the estimate
  has the dtype of its argument, as with `jax.grad`; tangents are drawn in float32 at least. All
  tangents in memory share one evaluation of `fun`, and nothing is stored for a backward pass:
  memory is that of K evaluations, or of `chunk` of them.

  In a training loop, replace `jax.value_and_grad(loss)(params, batch)` with
  `value_and_forward_grad(loss)(params, batch, key=key)`. It works under jit, vmap, scan and
  shard_map. In shard_map, give every device the same key: the mean of the devices' estimates is
  then the estimate for the mean loss, along common tangents.

  Args:
    fun: returns a scalar, or with `has_aux` a scalar and anything.
    argnums: which positional arguments (pytrees of real floating-point arrays) to differentiate.
    has_aux: see `jax.grad`; aux comes from the unperturbed evaluation.
    distribution: the distribution of tangents, over all differentiated entries together; one of `distributions`,
      or its name.
    num_tangents: number of tangents, K.
    chunk: how many tangents are in memory at once; None: all. Every chunk evaluates `fun` again,
      and `fun` is then traced as with `jax.jit`. A chunk of one needs no `vmap`.
    combine: 'mean', or 'projection' onto the tangents' span (too short by K/d, see
      `sampling.combine`).
    derivative: `derivatives.finite_difference(ε)`, one-sided or two-sided, in place of exact forward
      derivatives; the estimate is then as far off as the differences are.

  Returns:
    `(*args, key, **kwargs) -> (value, gradient)`, or `((value, aux), gradient)`; gradients are like
    those of `jax.grad`. `key` is for the tangents. If `fun` also has a required parameter `key`, it
    gets its own key, split from this one. To choose that key, pass it by position or bind it:
    `functools.partial(fun, key=...)`.

  Raises:
    ValueError: the output is not scalar, or an argument number is out of range.
    TypeError: an argument or the output is not real floating-point; `fun` uses a function with
      `jax.custom_vjp`, which has no forward derivative; with `has_aux`, the output is not a pair.

  >>> f = lambda x: (x ** 2).sum()
  >>> distribution = distributions.hadamard
  >>> step = value_and_forward_grad(f, distribution=distribution, num_tangents=4)
  >>> value, gradient = step(jnp.arange(4.), key=jax.random.key(0))
  >>> value.item(), gradient.tolist()
  (14.0, [0.0, 2.0, 4.0, 6.0])
  """
  sampling = Sampling(distribution, num_tangents, chunk=chunk, combine=combine)
  sampling.check()

  def run(*args: Any, key: jax.Array, **kwargs: Any) -> tuple[Any, PyTree]:
    of_point, point, key = bind(fun, argnums, key, args, kwargs)
    static = Static()

    def evaluate(point: tuple) -> tuple[jax.Array, list[jax.Array]]:
      value, aux = with_aux(of_point(point), has_aux)
      return _scalar(value), static.split(aux)

    try:
      value, arrays, estimate = _estimate(evaluate, point, key, sampling, derivative)
    except (TypeError, NotImplementedError) as error:
      raise explained(error, lambda: jax.make_jaxpr(evaluate)(point)) from error
    gradient = estimate[0] if isinstance(argnums, int) else estimate
    return ((value, static.join(arrays)) if has_aux else value), gradient

  return run


def _scalar(value: Any) -> jax.Array:
  if not isinstance(value, (jax.Array, np.ndarray, np.generic, float, int)):
    raise TypeError(
      f'forward gradients are of scalar functions; the output is {type(value).__name__}; allowed: a '
      'scalar, or with has_aux=True a pair of a scalar and anything'
    )
  if jnp.shape(value):
    raise ValueError(
      f'forward gradients are of scalar functions; the output has shape {jnp.shape(value)}'
    )
  if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
    raise TypeError(
      f'forward gradients are of real floating-point functions; the output has dtype '
      f'{jnp.result_type(value)}'
    )
  return jnp.asarray(value)


def forward_grad(
  fun: Callable, argnums: int | Sequence[int] = 0, has_aux: bool = False, **options: Any
) -> Callable:
  """`jax.grad` by forward gradients: `value_and_forward_grad` without the value.

  See there for the options.

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


def _estimate(
  evaluate: Callable,
  point: tuple,
  key: jax.Array,
  sampling: Sampling,
  derivative: Derivative | None,
) -> tuple[jax.Array, list[jax.Array], tuple]:
  """(value, aux, estimate). A tangent covers all entries, so orthogonality holds for the whole."""
  key = tangent_key(key)
  leaves, treedef = jax.tree.flatten(point)
  shapes, dtypes = [jnp.shape(leaf) for leaf in leaves], [jnp.result_type(leaf) for leaf in leaves]
  ends = np.cumsum([math.prod(shape) for shape in shapes])
  wide = functools.reduce(jnp.promote_types, dtypes, jnp.float32)

  def unravel(flat_D: jax.Array) -> tuple:
    parts = zip(jnp.split(flat_D, ends[:-1]), shapes, dtypes, strict=True)
    return jax.tree.unflatten(
      treedef, [part.reshape(shape).astype(dtype) for part, shape, dtype in parts]
    )

  ravel = lambda tree: jnp.concatenate(
    [leaf.ravel().astype(wide) for leaf in jax.tree.leaves(tree)]
  )

  distribution = distributions.as_distribution(sampling.distribution)

  def draw(chunk: Chunk) -> jax.Array:
    u_KxD = distribution.draw(key, chunk, (), int(ends[-1]), wide)
    # Use each tangent as rounded to the parameters' types.
    return u_KxD if set(dtypes) == {wide} else jax.vmap(lambda u: ravel(unravel(u)))(u_KxD)

  mean = lambda slope_K, u_KxD: combine(
    sampling.combine, slope_K[:, None], u_KxD, sampling.num_tangents
  )
  if sampling.at_once == sampling.num_tangents and derivative is None:
    u_KxD = draw(Chunk(sampling.num_tangents))
    along = lambda u: jax.jvp(evaluate, (point,), (unravel(u),), has_aux=True)
    # A function such as a Pallas kernel computes value and derivative in one, so there are K values.
    value_K, slope_K, aux_K = along_each(along, u_KxD)
    value, aux = jax.tree.map(
      lambda x: jax.lax.index_in_dim(x, 0, keepdims=False), (value_K, aux_K)
    )
    return value, aux, unravel(mean(slope_K, u_KxD))

  once = jax.jit(evaluate)  # traced once for all chunks
  value, aux = once(point)
  slope = (derivative or recomputed_jvp)(lambda point: once(point)[0], point, True)

  def part(chunk: Chunk) -> jax.Array:
    u_KxD = draw(chunk)
    return mean(along_each(lambda u: slope(unravel(u)), u_KxD), u_KxD)

  return value, aux, unravel(sum_over_chunks(part, sampling))

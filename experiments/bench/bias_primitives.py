"""Operations for `bias_hunt` that exercise every primitive with a rule, along every axis.

Each maps [B, T, C] to the same shape. Those along axis 0 let an example influence others, except
where the name says that the axis is mapped.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.scipy
from jax import lax
from jax.ad_checkpoint import checkpoint_name

ORDER = (2, 0, 3, 1)
Operation = Callable[[jax.Array], jax.Array]


def matrix(n: int) -> jax.Array:
  """A fixed matrix that can be inverted."""
  return 2 * jnp.eye(n) + jax.random.normal(jax.random.key(n), (n, n)) / 3


def last(operation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array, int], jax.Array]:
  """An operation on the last axis, along another one."""
  return lambda x, a: jnp.moveaxis(operation(jnp.moveaxis(x, a, -1)), -1, a)


def mapped(operation: Operation) -> Callable[[jax.Array, int], jax.Array]:
  """An operation on the other two axes, mapped over one."""
  return lambda x, a: jax.vmap(operation, a, a)(x)


def square(e: jax.Array) -> jax.Array:
  """A positive definite matrix of a matrix."""
  return jnp.tanh(e @ e.T) / 4 + 2 * jnp.eye(len(e))


def indices(x: jax.Array, a: int) -> tuple:
  """The index that puts axis `a` into another order."""
  return (*[slice(None)] * a, jnp.array([n for n in ORDER if n < x.shape[a]]))


def window(x: jax.Array, a: int, start: float, reduce: Callable) -> jax.Array:
  """Neighbours along an axis, combined."""
  sizes = [2 if axis == a else 1 for axis in range(x.ndim)]
  return lax.reduce_window(x, x.dtype.type(start), reduce, sizes, (1,) * x.ndim, 'SAME')


def convolved(x: jax.Array) -> jax.Array:
  """[spatial, batch, feature]."""
  numbers = ('WNC', 'WIO', 'WNC')
  kernel = jnp.stack([matrix(x.shape[2]), matrix(x.shape[2]).T]).astype(x.dtype)
  return lax.conv_general_dilated(x, kernel, (1,), 'SAME', dimension_numbers=numbers)


def cg(v: jax.Array) -> jax.Array:
  """Conjugate gradients for a vector."""
  product = lambda v: (matrix(v.size) @ matrix(v.size).T).astype(v.dtype) @ v
  return jax.scipy.sparse.linalg.cg(product, v.ravel(), maxiter=3)[0].reshape(v.shape)


def scanned(x: jax.Array) -> jax.Array:
  return lax.scan(lambda c, e: (jnp.tanh(c + e),) * 2, jnp.zeros_like(x[0]), x)[1]


def in_two(x: jax.Array) -> jax.Array:
  """The first axis in two halves, each mapped by itself."""
  return lax.map(jnp.tanh, x.reshape(2, -1, *x.shape[1:])).reshape(x.shape)


def first(operation: Operation) -> Callable[[jax.Array, int], jax.Array]:
  """An operation on the first axis, along another one."""
  return lambda x, a: jnp.moveaxis(operation(jnp.moveaxis(x, a, 0)), 0, a)


def updated(x: jax.Array, a: int) -> jax.Array:
  one = lax.slice_in_dim(x, 0, 1, axis=a)
  return lax.dynamic_update_slice_in_dim(x, jnp.sin(one), x.shape[a] - 1, a)


ALONG: dict[str, Callable[[jax.Array, int], jax.Array]] = {
  **{
    name: functools.partial(lambda x, a, f: f(jnp.tanh(x), axis=a, reverse=True), f=f)
    for name, f in {
      'cumsum': lax.cumsum,
      'cumprod': lax.cumprod,
      'cummax': lax.cummax,
      'cummin': lax.cummin,
      'cumlogsumexp': lax.cumlogsumexp,
    }.items()
  },
  **{
    name: functools.partial(lambda x, a, f: x - f(x, axis=a, keepdims=True), f=f)
    for name, f in {
      'reduce_sum': jnp.sum,
      'reduce_max': jnp.max,
      'reduce_min': jnp.min,
      'reduce_prod': jnp.prod,
    }.items()
  },
  **{
    f'scatter_{kind}': functools.partial(
      lambda x, a, kind: getattr(x.at[indices(x, a)], kind)(jnp.tanh(x), unique_indices=True),
      kind=kind,
    )
    for kind in ('set', 'add', 'subtract', 'mul', 'min', 'max')
  },
  'scatter of one': lambda x, a: x.at[(*[slice(None)] * a, 0)].add(jnp.tanh(x).take(1, a)),
  'mapped scatter': mapped(lambda e: e.at[jnp.array([1, 0])].add(jnp.tanh(e[:2]))),
  'gather': lambda x, a: x[indices(x, a)],
  'gather of one': lambda x, a: x * jnp.take(x, jnp.array([1]), axis=a),
  'mapped gather': mapped(lambda e: e[jnp.array([*range(1, len(e)), 0])]),
  'sort': lambda x, a: lax.sort(x, dimension=a),
  'sort of two': lambda x, a: lax.sort([x, jnp.sin(x)], dimension=a, num_keys=1)[1],
  'top_k': lambda x, a: x - lax.top_k(x, 1, axis=a)[0],
  'all of top_k': lambda x, a: lax.top_k(x, x.shape[a], axis=a)[0],
  'approx_max_k': lambda x, a: x - lax.approx_max_k(x, 1, reduction_dimension=a)[0],
  'rev': lambda x, a: lax.rev(x, (a,)),
  'concatenate': lambda x, a: jnp.roll(x, 1, a),
  'split': lambda x, a: lax.concatenate(jnp.split(x, 2, a)[::-1], a),
  'stack': lambda x, a: jnp.stack([jnp.sin(e) for e in jnp.unstack(x, axis=a)][::-1], axis=a),
  'pad': lambda x, a: lax.pad(
    x, x.dtype.type(0), [(1, -1, 0) if a == n else (0, 0, 0) for n in range(3)]
  ),
  'slice': lambda x, a: x * lax.slice_in_dim(x, 1, 2, axis=a),
  'dynamic_slice': lambda x, a: x * lax.dynamic_slice_in_dim(x, x.size - x.size + 1, 1, a),
  'dynamic_update_slice': updated,
  'reduce_window_sum': lambda x, a: window(x, a, 0.0, lax.add),
  'reduce_window_max': lambda x, a: window(x, a, -jnp.inf, lax.max),
  'reduce_window_min': lambda x, a: window(x, a, jnp.inf, lax.min),
  'convolution': first(convolved),
  'dot_general': last(lambda x: x @ matrix(x.shape[-1])),
  'product of all pairs': last(lambda x: jnp.einsum('...i,...j->...ij', x, x).mean(-1)),
  'fft': lambda x, a: jnp.fft.fft(x, axis=a).real,
  'rfft': last(lambda x: jnp.fft.irfft(jnp.fft.rfft(x), x.shape[-1])),
  'tile': last(lambda x: jnp.tile(x, 2)[..., 1 : 1 + x.shape[-1]]),
  'transpose': last(lambda x: jnp.tanh(x.T).T),
  'merged': first(lambda x: jnp.tanh(x.reshape(-1, x.shape[-1])).reshape(x.shape)),
  'merged and rolled': first(lambda x: jnp.roll(x.reshape(-1), 1).reshape(x.shape)),
  'halves': first(in_two),
  'scan': first(scanned),
  'scan without carry': first(lambda x: lax.scan(lambda c, e: (c, jnp.tanh(e)), 0.0, x)[1]),
  'associative_scan': lambda x, a: lax.associative_scan(jnp.add, x, axis=a),
  'while': first(lambda x: lax.fori_loop(0, 2, lambda n, y: y + jnp.roll(y, 1, 0), x)),
  'solve': last(lambda x: jnp.linalg.solve(matrix(x.shape[-1]), x[..., None])[..., 0]),
  'triangular_solve': first(
    lambda x: jax.scipy.linalg.solve_triangular(
      matrix(len(x)) + jnp.triu(jnp.ones((len(x),) * 2)), x.reshape(len(x), -1)
    ).reshape(x.shape)
  ),
  'tridiagonal_solve': mapped(
    lambda e: lax.linalg.tridiagonal_solve(
      *(jnp.full(e.shape[:1], n, e.dtype) for n in (0.1, 2.0, 0.1)), e
    )
  ),
  'conjugate gradients': mapped(cg),
  'mapped inv': mapped(lambda e: jnp.linalg.inv(square(e)) @ e),
  'mapped slogdet': mapped(lambda e: e * jnp.linalg.slogdet(square(e))[1]),
  'mapped expm': mapped(lambda e: jax.scipy.linalg.expm(square(e) / 4) @ e),
  'mapped cholesky': mapped(lambda e: jnp.linalg.cholesky(square(e)) @ e),
  'mapped eigenvalues': mapped(lambda e: e * jnp.linalg.eigh(square(e))[0].max()),
  'mapped singular values': mapped(lambda e: e * jnp.linalg.svd(square(e), compute_uv=False).max()),
  'mapped qr': mapped(lambda e: jnp.linalg.qr(square(e))[1] @ e),
  'mapped lu': mapped(lambda e: e * jnp.linalg.det(square(e))),
  'mapped cond': mapped(lambda e: lax.cond(e.sum() > 0, jnp.sin, jnp.tanh, e)),
  'mapped batch norm': mapped(lambda e: (e - e.mean()) / jnp.sqrt(1 + e.var())),
}
_UNARY: list[Operation] = [
  *(
    lambda x, f=f: f(jnp.tanh(x) / 2)
    for f in (lax.asin, lax.acos, lax.atan, lax.atanh, lax.erf_inv)
  ),
  *(
    lambda x, f=f: f(1.5 + jnp.tanh(x)) for f in (lax.log, lax.log1p, lax.sqrt, lax.rsqrt, lax.cbrt)
  ),
  *(
    lambda x, f=f: f(1.5 + jnp.tanh(x))
    for f in (lax.lgamma, lax.digamma, lax.acosh, lax.reciprocal)
  ),
  *(
    lambda x, f=f: f(jnp.tanh(x))
    for f in (lax.exp, lax.exp2, lax.expm1, lax.erf, lax.erfc, lax.sinh)
  ),
  *(
    lambda x, f=f: f(jnp.tanh(x))
    for f in (lax.cosh, lax.asinh, lax.sin, lax.cos, lax.tan, lax.square)
  ),
  *(
    lambda x, f=f: f(jnp.tanh(x))
    for f in (lax.logistic, lax.abs, lax.neg, lax.bessel_i0e, lax.bessel_i1e)
  ),
  lambda x: lax.integer_pow(x, 3) / 9,
  lambda x: lax.reduce_precision(x, 11, 52),
  lambda x: lax.real(lax.conj(lax.complex(x, x))) + lax.imag(lax.complex(x, x)),
  lambda x: lax.clamp(-1.0, x, 1.0),
  lambda x: lax.optimization_barrier(x) + jax.device_put(x),
  lambda x: checkpoint_name(x, 'named'),
  lambda x: x.astype(jnp.float32).astype(x.dtype),
]
_BINARY: list[Operation] = [
  *(
    lambda x, f=f: f(1.5 + jnp.tanh(x), 2 + jnp.sin(x))
    for f in (lax.pow, lax.atan2, lax.rem, lax.div)
  ),
  *(lambda x, f=f: f(x, jnp.sin(x) / 2) for f in (lax.add, lax.sub, lax.mul, lax.max, lax.min)),
  lambda x: jnp.where(x > 0, jnp.sin(x), jnp.tanh(x)),
  lambda x: lax.igamma(2.0 + jnp.zeros_like(x), 1.5 + jnp.tanh(x)),
]


def chain(functions: list[Operation], x: jax.Array) -> jax.Array:
  """The mean of several functions of every entry."""
  return sum(f(x) for f in functions) / 4  # type: ignore[return-value]


OPERATIONS: dict[str, Operation] = {
  **{
    f'{name} along {a}': functools.partial(lambda x, f, a: f(x, a), f=f, a=a)
    for name, f in ALONG.items()
    for a in range(3)
  },
  'entry by entry': functools.partial(chain, _UNARY),
  'two entries': functools.partial(chain, _BINARY),
}

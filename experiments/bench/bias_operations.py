"""Operations from which `bias_hunt` builds programs: [B, T, C] to the same shape.

Those in MIXING let an example influence others. Those in APART do not.
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, C = 4, 2, 4  # examples, positions, channels
_KEYS = jax.random.split(jax.random.key(7), 3)
W, V = (jax.random.normal(key, (C, C)) / 2 for key in _KEYS[:2])
ACROSS = jnp.eye(B) + jax.random.normal(_KEYS[2], (B, B)) / 4
ORDER = jnp.array([2, 0, 3, 1])
WINDOW = jnp.stack([W, V, W + V])


@jax.custom_jvp
def sine(x):
  """A function with a rule of its own."""
  return jnp.sin(x)


@sine.defjvp
def _sine_rule(at, along):
  return jnp.sin(at[0]), jnp.cos(at[0]) * along[0]


def attention(x):
  """Each position looks at all positions of its example."""
  weight = jax.nn.softmax(jnp.einsum('btc,bsc->bts', x @ W, x @ V))
  return jnp.einsum('bts,bsc->btc', weight, x)


def recurrent(x):
  """A scan along the leading axis."""

  def step(carry, row):
    carry = jnp.tanh(carry @ W + row)
    return carry, carry

  return lax.scan(step, jnp.zeros(x.shape[1:], x.dtype), x)[1]


def convolution(x):
  """Along the second axis."""
  numbers = ('NWC', 'WIO', 'NWC')
  return lax.conv_general_dilated(
    x, WINDOW.astype(x.dtype), (1,), 'SAME', dimension_numbers=numbers
  )


def on_swapped(operation):
  """An operation on the array with examples and positions swapped."""
  return lambda x: jnp.swapaxes(operation(jnp.swapaxes(x, 0, 1)), 0, 1)


def window(x, size, axis, start, reduce):
  """A sum or maximum over neighbours along an axis."""
  sizes = [size if a == axis else 1 for a in range(x.ndim)]
  return lax.reduce_window(x, start, reduce, sizes, (1,) * x.ndim, 'SAME')


def solve(x):
  """Each example solves its own system."""
  system = jnp.broadcast_to(3 * jnp.eye(C) + W, (B, C, C))
  return jnp.swapaxes(jnp.linalg.solve(system, jnp.swapaxes(x, 1, 2)), 1, 2)


def cholesky(x):
  """Each example factors its own matrix."""
  square = jnp.einsum('btc,btd->bcd', x, x) + 3 * jnp.eye(C)
  return jnp.linalg.cholesky(square)[:, :T]


APART = {
  'linear': lambda x: x @ W,
  'layer norm': lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(1 + x.var(-1, keepdims=True)),
  'softmax over positions': lambda x: jax.nn.softmax(x, 1),
  'relu': jax.nn.relu,
  'own rule': sine,
  'attention': attention,
  'scan over positions': on_swapped(recurrent),
  'scan over examples, no carry': lambda x: lax.scan(lambda c, e: (c, jnp.tanh(e @ W)), 0, x)[1],
  'convolution over positions': convolution,
  'cumulative sum of positions': lambda x: jnp.cumsum(x, 1),
  'sorted channels': lambda x: jnp.sort(x, -1),
  'largest channels': lambda x: lax.top_k(x, C)[0],
  'positions flipped': lambda x: x[:, ::-1],
  'positions and channels rolled': lambda x: jnp.roll(x.reshape(B, -1), 1, 1).reshape(x.shape),
  'examples and positions merged': lambda x: jnp.tanh(x.reshape(-1, C) @ W).reshape(x.shape),
  'gather of positions': lambda x: x[:, jnp.array([1, 0])],
  'scatter of positions': lambda x: jnp.zeros_like(x).at[:, jnp.array([1, 0])].add(x),
  'vmap over examples': jax.vmap(lambda e: jnp.tanh(e @ W) * e.sum()),
  'map over examples': lambda x: lax.map(lambda e: jnp.tanh(e @ W), x),
  'map in batches': lambda x: lax.map(lambda e: jnp.tanh(e @ W), x, batch_size=2),
  'loop': lambda x: lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y @ W), x),
  'cond': lambda x: lax.cond(jnp.bool_(True), lambda y: 2 * y, jnp.sin, x),
  'remat': jax.checkpoint(lambda x: jnp.tanh(x @ W)),
  'jit': jax.jit(lambda x: jnp.tanh(x @ V)),
  'solve': solve,
  'cholesky': cholesky,
  'fourier over channels': lambda x: jnp.fft.fft(x).real,
  'maximum of positions': lambda x: window(x, 2, 1, -jnp.inf, lax.max),
  'chosen channel': lambda x: x * jax.nn.one_hot(x.argmax(-1), C),
  'stopped mean of the batch': lambda x: x * lax.stop_gradient(x.mean(0)),
}
MIXING = {
  'batch norm': lambda x: (x - x.mean(0)) / jnp.sqrt(1 + x.var(0)),
  'largest norm of the batch': lambda x: x / jnp.linalg.norm(x),
  'examples rolled': lambda x: x + jnp.roll(x, 1, 0),
  'examples flipped': lambda x: x * x[::-1],
  'examples sorted': lambda x: jnp.sort(x, 0),
  'examples in another order': lambda x: x[ORDER] + x,
  'examples taken along': lambda x: jnp.take_along_axis(x, ORDER[:, None, None], 0) * x,
  'cumulative sum of examples': lambda x: jnp.cumsum(x, 0),
  'associative scan of examples': lambda x: lax.associative_scan(jnp.add, x),
  'scan over examples': recurrent,
  'convolution over examples': on_swapped(convolution),
  'fourier over examples': lambda x: jnp.fft.fft(x, axis=0).real,
  'similarity of examples': lambda x: jnp.einsum('btc,dtc->bd', x, x)[:, :T, None] * x,
  'matrix over examples': lambda x: jnp.einsum('ab,btc->atc', ACROSS, x),
  'largest example': lambda x: x * x.max(0),
  'merged, then rolled': lambda x: jnp.roll(x.reshape(-1, C), 1, 0).reshape(x.shape),
  'one example for all': lambda x: lax.dynamic_slice(x, (1, 0, 0), (1, T, C)) * x,
  'scatter of examples': lambda x: jnp.zeros_like(x).at[ORDER].add(x) * x,
  'sums of segments': lambda x: x + jax.ops.segment_sum(x, jnp.array([0, 0, 1, 1]), B),
  'sums of neighbours': lambda x: window(x, 2, 0, 0.0, lax.add),
  'halves added': lambda x: jnp.concatenate([x[:2] + x[2:], x[:2] - x[2:]]),
  'loop over rolled examples': lambda x: lax.fori_loop(
    0, 2, lambda i, y: jnp.tanh(y + jnp.roll(y, 1, 0)), x
  ),
  'vmap over positions': jax.vmap(lambda e: e * e.sum(), 1, 1),
}

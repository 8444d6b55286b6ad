"""Small networks as bare functions, with an exchangeable middle, shared by the tests."""

import jax
import jax.numpy as jnp

from lfg_jax import tap
from lfg_jax.tangents import distributions

BATCH = 3
KEYS = jax.random.split(jax.random.key(0), 9)
X, Y = jax.random.normal(KEYS[0], (BATCH, 4)), jax.random.normal(KEYS[1], (BATCH, 4))
W = {name: 0.7 * jax.random.normal(key, (4, 4)) for name, key in zip('abc', KEYS[2:5], strict=True)}
EXACT = {'distribution': distributions.haar, 'num_tangents': 4, 'joint': False}


@jax.custom_vjp
def straight_through(x):
  return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


def layer(w, x, name, **options):
  return jnp.tanh(tap(x @ w, name, **options))


def square(out):
  return ((out - Y) ** 2).sum(-1)


def bare(w, middle):
  """The losses of a network of two layers with `middle` between them."""
  h = middle(w['b'], layer(w['a'], X, 'a'))
  return square(layer(w['c'], h, 'c'))


def jitted(w, h):  # one jaxpr, called twice: two taps
  one = jax.jit(lambda h: layer(w, h, 'b'))
  return one(one(h))


def rematted(w, h):
  one = jax.checkpoint(lambda h: layer(w, h, 'b'))
  return one(one(h))


def branched(w, h):
  """Conditionals with a branch that is taken and one that is not, with a tap in each."""
  h = jax.lax.cond(h.sum() > -1e9, lambda h: layer(w, h, 'yes'), lambda h: layer(w, h, 'no'), h)
  return jax.lax.cond(h.sum() > 1e9, lambda h: layer(w, h, 'rare'), lambda h: h, h)


def selected(w, h):  # vmap makes a select of a branch
  one = lambda h: jax.lax.cond(
    h[0] > 0, lambda h: layer(w, h, 'yes'), lambda h: layer(-w, h, 'no'), h
  )
  return jax.vmap(one)(h)


def active(w, h):
  z = h @ w
  return jax.nn.relu(tap(z, 'relu', active=z > 0))


def normed(w, h):  # per example
  z = tap(h @ w, 'normed')
  return (z - z.mean(1, keepdims=True)) / jnp.sqrt(z.var(1, keepdims=True) + 0.1)


def attention(w, h):
  h_BxTxD = jnp.stack([h, layer(w, h, 'second')], 1)
  weights = jax.nn.softmax(jnp.einsum('btd,bsd->bts', h_BxTxD, h_BxTxD))
  return jnp.einsum('bts,bsd->btd', weights, h_BxTxD).mean(1)


MIDDLES = {
  'nothing': lambda w, h: layer(w, h, 'b'),
  'jit': jitted,
  'remat': rematted,
  'cond': branched,
  'vmap': lambda w, h: jax.vmap(lambda h: layer(w, h, 'b'))(h),
  'vmapped cond': selected,
  'active': active,
  'norm of an example': normed,
  'attention': attention,
}


def scanned(w, h):
  return jax.lax.scan(
    jax.checkpoint(lambda h, _: (jax.jit(lambda h: layer(w, h, 'b'))(h), None)), h, None, length=3
  )[0]


def gru(w, h):
  def cell(h, x):
    gate = jax.nn.sigmoid(tap(x @ w, 'gate'))
    return (1 - gate) * h + gate * layer(w, h, 'candidate'), h

  h, outs = jax.lax.scan(cell, h, jnp.stack([h, -h]), reverse=True)
  return h + outs.sum(0)


def batch_normed(w, h):
  z = tap(h @ w, 'normed')
  return jnp.tanh((z - z.mean(0)) / jnp.sqrt(z.var(0) + 0.1))


def dropout(w, h):
  return jnp.where(jax.random.bernoulli(KEYS[6], 0.5, h.shape), layer(w, h, 'b'), 0)


NOISY = {
  'scan of remat of jit': scanned,
  'gru': gru,
  'batch norm': batch_normed,
  'dropout': dropout,
  'jit': jitted,
  'cond': branched,
  'vmapped cond': selected,
  'remat': rematted,
}


def objective(fun):
  return jax.jit(jax.value_and_grad(lambda *args: fun(*args).sum() / BATCH))

"""Straightforward, slow versions of the library's computations, from the paper's equations."""

import jax
import jax.numpy as jnp


def layer_norm(x):
  return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)


def naive_replicated_loss(
  features_BxPxGxC, kernel_GxCxK, bias_K, label_B, cut_patch=True, cut_group=True
):
  """The replicated loss from P·G copies of the features, each with all but one entry stopped."""
  _, P, G, _ = features_BxPxGxC.shape
  same_patch = jnp.eye(P, dtype=bool) if cut_patch else jnp.ones((1, P), bool)
  same_group = jnp.eye(G, dtype=bool) if cut_group else jnp.ones((1, G), bool)
  own_PxGxPxG = same_patch[:, None, :, None] & same_group[None, :, None, :]
  own = own_PxGxPxG[None, ..., None]
  f = features_BxPxGxC[:, None, None]
  copies_BxPxGxPxGxC = jnp.where(own, f, jax.lax.stop_gradient(f))
  mean = copies_BxPxGxPxGxC.mean(3)
  logits = jnp.einsum('bpqgc,gck->bpqk', mean, kernel_GxCxK) + bias_K
  log_p = jax.nn.log_softmax(logits)
  return -jnp.take_along_axis(log_p, label_B[:, None, None, None], -1)[..., 0]


def norm(name, without, x):
  """`layer_norm`, unless the norm with this name is left out."""
  return x if name == without else layer_norm(x)


def mixed(x_BxPxC, kernel):
  """Mixes tokens by a P×P matrix, or per channel by a k×k convolution on their square grid."""
  if kernel.ndim == 2:
    return jnp.einsum('bpc,pq->bqc', x_BxPxC, kernel)
  B, P, C = x_BxPxC.shape
  side, k = round(P**0.5), kernel.shape[0]
  around = (k // 2, k // 2)
  grid = jnp.pad(x_BxPxC.reshape(B, side, side, C), ((0, 0), around, around, (0, 0)))
  return sum(
    grid[:, i : i + side, j : j + side] * kernel[i, j, 0] for i in range(k) for j in range(k)
  ).reshape(B, P, C)


def block(params, x, groups, mix, without=None):
  """The output [B, P, C] of one LocalMixer block (spec: LN → linear → LN → ReLU …)."""
  h = x
  if mix:
    h = mixed(norm('token_in', without, h), params['token']['kernel']) + params['token']['bias']
    h = jax.nn.relu(norm('token_out', without, h))
  h = norm('channel_in', without, h) @ params['channel']['kernel'] + params['channel']['bias']
  h = jax.nn.relu(norm('channel_out', without, h))
  g = norm('group_in', without, h.reshape(*h.shape[:2], groups, -1))
  g = jnp.einsum('bpgc,gcd->bpgd', g, params['group']['kernel']) + params['group']['bias']
  z = norm('group_out', without, g).reshape(h.shape)
  return jax.nn.relu(z + x if mix else z)


def logits(params, x, groups, without=None):
  """The logits of the whole network, from its tokens."""
  for n, p in enumerate(unstack(params)):
    x = block(p, x, groups, mix=n > 0, without=without)
  linear = params['readout']['linear']
  return norm('readout', without, x.mean(1)) @ linear['kernel'] + linear['bias']


def unstack(params):
  """[stem, block 1, …] from the model's parameter tree."""
  out = [params['stem']]
  if 'blocks' in params:
    count = params['blocks']['channel']['bias'].shape[0]
    out += [jax.tree.map(lambda leaf, i=i: leaf[i], params['blocks']) for i in range(count)]
  return out


def objective(
  params,
  tokens,
  label,
  weight,
  groups,
  *,
  local,
  cut,
  loss=naive_replicated_loss,
  without=None,
  ahead=None,
):
  """The objective of LG-BP (local, cut), L-BP (local) or BP.

  It is a sum over replicas, and a weighted sum over examples. `ahead` has the block through which
  each head looks, by stack; None: heads read their own block's output.
  """
  x, value = tokens, 0.0
  for n, p in enumerate(unstack(params)):
    x = block(p, jax.lax.stop_gradient(x) if cut else x, groups, mix=n > 0, without=without)
    if local:
      y = x if ahead is None else block(unstack(ahead)[n], x, groups, mix=True)
      features = norm('head', without, y.reshape(*y.shape[:2], groups, -1))
      head, frozen = p['head'], jax.tree.map(jax.lax.stop_gradient, p['head'])
      value += (loss(features, frozen['kernel'], frozen['bias'], label).sum((1, 2)) * weight).sum()
      replicas = loss(jax.lax.stop_gradient(features), head['kernel'], head['bias'], label)
      value += (replicas.mean((1, 2)) * weight).sum()
  x = jax.lax.stop_gradient(x) if local else x
  linear = params['readout']['linear']
  log_p = jax.nn.log_softmax(
    norm('readout', without, x.mean(1)) @ linear['kernel'] + linear['bias']
  )
  return value - (jnp.take_along_axis(log_p, label[:, None], -1)[:, 0] * weight).sum()

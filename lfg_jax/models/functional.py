"""Layers as pure functions of their parameters, for models written without modules.

Parameters are {'kernel', 'bias'}. With `feedback` {'kernel'}, a fixed or learned matrix replaces
the kernel when gradients are sent to the layer's input.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.losses.heads import Heads
from lfg_jax.losses.replicated import Cut
from lfg_jax.losses.staged import Variables
from lfg_jax.losses.targets import Targets
from lfg_jax.models import layers
from lfg_jax.promotion import upcast

Params = dict[str, jax.Array]


def init(
  key: jax.Array, kernel: tuple[int, ...], bias: tuple[int, ...], fan_in: int, kind: str = 'lecun'
) -> Params:
  """A random kernel (see `layers.initializer`) and a zero bias.

  >>> jax.tree.map(jnp.shape, init(jax.random.key(0), (3, 4), (4,), 3))
  {'bias': (4,), 'kernel': (3, 4)}
  """
  return {'kernel': layers.initializer(kind, fan_in)(key, kernel), 'bias': jnp.zeros(bias)}


def init_head(
  key: jax.Array, heads: Heads, groups: int, width: int, classes: int, kind: str = 'lecun'
) -> dict[str, Any]:
  """Parameters of a local head on `groups` groups of `width` channels.

  The last layer is zero, except with contrastive losses, where a zero projection would have no
  direction. A hidden layer is random.

  >>> jax.tree.map(jnp.shape, init_head(jax.random.key(0), Heads(hidden=7), 2, 3, 10))['out']
  {'bias': (10,), 'kernel': (7, 10)}
  """
  outputs, last = heads.outputs(classes), kind if heads.contrast else 'zero'
  if not heads.hidden:
    return init(key, (groups, width, outputs), (outputs,), groups * width, last)
  first, second = jax.random.split(key)
  hidden = init(first, (groups, width, heads.hidden), (heads.hidden,), groups * width, kind)
  return {**hidden, 'out': init(second, (heads.hidden, outputs), (outputs,), heads.hidden, last)}


def affine(linear: Callable, params: Params, x: jax.Array, feedback: Any = None) -> jax.Array:
  """linear(x, kernel) + bias, where `linear` is `layers.dense`, `grouped`, `convolution`, …."""
  if feedback:
    out = layers.with_feedback(linear, x, params['kernel'], feedback['kernel'])
  else:
    out = linear(x, params['kernel'])
  bias = params['bias']
  return out + jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))


def layer(variables: Variables, name: str, linear: Callable, x: jax.Array) -> jax.Array:
  """A block's layer `name`, as `affine`, with its feedback matrices if there are any."""
  feedback = variables.get('feedback', {}).get(name)
  return affine(linear, variables['params'][name], x, feedback)


def losses(
  variables: Variables, heads: Heads, features: jax.Array, targets: Targets, cut: Cut | None
) -> jax.Array | None:
  """Those of a block's features [B, P, G, C], see `Heads.losses`; None without a cut."""
  if cut is None:
    return None
  feedback = variables.get('feedback', {}).get('head')
  return heads.losses(features, variables['params']['head'], targets, cut, feedback)


def init_read_out(key: jax.Array, width: int, classes: int) -> dict[str, Params]:
  """Parameters of `read_out`: zeros."""
  return {'linear': init(key, (width, classes), (classes,), width, 'zero')}


def read_out(
  variables: Variables, x: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array, Variables]:
  """Mean over positions → norm → linear. Returns logits, features [B, C] and no updates."""
  del weight_B
  features = _mean_feature(x)
  return layer(variables, 'linear', layers.dense, features), features, {}


def _mean_feature(x: jax.Array) -> jax.Array:
  """[B, C] of [B, ..., C]."""
  mean_BxC = upcast(x).reshape(x.shape[0], -1, x.shape[-1]).mean(1)
  return layers.layer_norm(mean_BxC).astype(x.dtype)


def stacked(init_one: Callable[[jax.Array], Any], key: jax.Array, count: int) -> Any:
  """Parameters of `count` equal blocks, stacked along the first axis."""
  return jax.vmap(init_one)(jax.random.split(key, count))


def init_projection(key: jax.Array, width: int, heads: Heads) -> dict[str, Any]:
  """{'head': parameters of `projection`}, or nothing where there is none."""
  if not (heads.contrast and heads.project):
    return {}
  outputs = heads.contrast.projections
  return {'head': {'linear': init(key, (width, outputs), (outputs,), width)}}


def projection(heads: Heads) -> Callable | None:
  """Mean over positions → norm → linear, for `StagedModel.project`; None where there is none."""
  contrast = heads.contrast
  if not (contrast and heads.project):
    return None

  def project(
    variables: Variables, x: jax.Array, weight_B: jax.Array
  ) -> tuple[jax.Array, jax.Array, Variables]:
    del weight_B
    z_BxK = layer(variables, 'linear', layers.dense, _mean_feature(x))
    return z_BxK, jax.lax.stop_gradient(z_BxK) if contrast.stop_gradient else z_BxK, {}

  return project

"""Layers as pure functions of their parameters: norms, linear maps, local heads, ends of a network.

A linear layer's parameters are {'kernel', 'bias'}. With `feedback` {'kernel'}, a fixed or learned
matrix replaces the kernel when gradients are sent to the layer's input (feedback alignment,
Lillicrap et al. 2016). Norms have no parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.local.heads import Heads
from lfg_jax.local.replicated import Cut
from lfg_jax.local.staged import Variables
from lfg_jax.local.targets import Targets
from lfg_jax.promotion import upcast

PyTree = Any
Params = dict[str, jax.Array]
EPSILON = 1e-5
LEARNING_STRIDE = 5  # between the patches used to learn feedback; must not divide a row's length
RUNNING = 0.9  # weight of the past in running statistics, per step


# --- norms ----------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def layer_norm(x: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
  """x with zero mean and unit variance over `axes`; no learned scale or bias, ε = 1e-5.

  >>> [round(y, 3) for y in layer_norm(jnp.array([0., 2., 4.])).tolist()]
  [-1.225, 0.0, 1.225]
  """
  return _normalise(x, axes)[0].astype(x.dtype)


def _normalise(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  centred = upcast(x) - upcast(x).mean(axes, keepdims=True)
  scale = jax.lax.rsqrt((centred * centred).mean(axes, keepdims=True) + EPSILON)
  return centred * scale, scale


@layer_norm.defjvp
def _layer_norm_jvp(
  axes: tuple[int, ...], primals: tuple, tangents: tuple
) -> tuple[jax.Array, jax.Array]:
  """The projection (1 - 1/n - y yᵀ/n) · scale, which is symmetric: its transpose costs the same."""
  (x,), (dx,) = primals, tangents
  y, scale = _normalise(x, axes)
  dx = upcast(dx)
  dy = scale * (dx - dx.mean(axes, keepdims=True) - y * (y * dx).mean(axes, keepdims=True))
  return y.astype(x.dtype), dy.astype(x.dtype)


def init_statistics(channels: int) -> Params:
  """Running statistics of `batch_norm`, before the first step."""
  return {'mean': jnp.zeros(channels, jnp.float32), 'var': jnp.ones(channels, jnp.float32)}


def batch_norm(
  x: jax.Array,
  weight_B: jax.Array,
  running: Params,
  *,
  train: bool = True,
  axis_name: str | None = None,
) -> tuple[jax.Array, Params]:
  """x with zero mean and unit variance over the global batch, and the new running statistics.

  The statistics are sums over devices, which may have different numbers of real examples, or none.
  (`flax.linen.BatchNorm` averages the devices' means, and divides 0 by 0 if a device has only
  padding.)

  Args:
    x: [B, C], [B, P, C] or, in groups, [B, P, G, C].
    weight_B: zero for examples that pad the batch.
    running: 'mean' and 'var' of steps before, in place of the batch's if not `train`.
    axis_name: mesh axis over which the batch is sharded.

  >>> x, new = batch_norm(jnp.array([[1.], [3.]]), jnp.ones(2), init_statistics(1))
  >>> x.round(2).tolist(), [round(mean, 3) for mean in new['mean'].tolist()]
  ([[-1.0], [1.0]], [0.2])
  """
  channels = math.prod(x.shape[2:] or x.shape[1:])
  flat_BxNxC = upcast(x).reshape(x.shape[0], -1, channels)
  mean, variance = running['mean'], running['var']
  if train:
    total = lambda a: jax.lax.psum(a, axis_name) if axis_name else a
    # Not in x's dtype: in bfloat16, 359 examples would be 360.
    real_Bx1x1 = (weight_B > 0).astype(flat_BxNxC.dtype)[:, None, None]
    count = total(real_Bx1x1.sum() * flat_BxNxC.shape[1])
    mean = total((flat_BxNxC * real_Bx1x1).sum((0, 1))) / count
    variance = total(((flat_BxNxC - mean[None, None]) ** 2 * real_Bx1x1).sum((0, 1))) / count
    moved = lambda old, new: RUNNING * old + (1 - RUNNING) * jax.lax.stop_gradient(new)
    running = {'mean': moved(running['mean'], mean), 'var': moved(running['var'], variance)}
  normalised = (flat_BxNxC - mean[None, None]) * jax.lax.rsqrt(variance + EPSILON)[None, None]
  return normalised.astype(x.dtype).reshape(x.shape), running


# --- products, whose orientation decides their speed ----------------------------------------------


def dense(x: jax.Array, kernel_CxD: jax.Array) -> jax.Array:
  """[..., C] → [..., D], as one product of two matrices.

  With several leading axes, XLA would copy the arguments to compute the kernel's gradient.
  """
  return (x.reshape(-1, x.shape[-1]) @ kernel_CxD).reshape(*x.shape[:-1], -1)


def grouped(x_BxPxGxC: jax.Array, kernel_GxCxD: jax.Array) -> jax.Array:
  """Multiplies every group by its own matrix.

  The group axis leads the product, which is several times faster on CPUs.
  """
  B, P, G, C = x_BxPxGxC.shape
  x_GxNxC = jnp.moveaxis(x_BxPxGxC.reshape(B * P, G, C), 1, 0)
  return jnp.moveaxis(x_GxNxC @ kernel_GxCxD, 0, 1).reshape(B, P, G, -1)


def across_tokens(x_BxPxC: jax.Array, kernel_PxP: jax.Array) -> jax.Array:
  """One P×P matrix, shared by channels.

  The token axis leads the product, which makes the kernel's gradient twice as fast.
  """
  B, P, C = x_BxPxC.shape
  x_PxN = jnp.moveaxis(x_BxPxC, 1, 0).reshape(P, B * C)
  return jnp.moveaxis((kernel_PxP.T @ x_PxN).reshape(P, B, C), 0, 1)


# --- convolutions ---------------------------------------------------------------------------------


def depthwise(x_BxPxC: jax.Array, kernel_KxKx1xC: jax.Array) -> jax.Array:
  """Depth-wise k×k convolution over the square grid of tokens, zero padding.

  As a sum of shifted images, because on CPUs XLA's own depth-wise convolution is 30 times slower.
  """
  (B, P, C), k = x_BxPxC.shape, len(kernel_KxKx1xC)
  side, before = round(P**0.5), (k - 1) // 2
  margin = (before, k - 1 - before)
  padded = jnp.pad(x_BxPxC.reshape(B, side, side, C), ((0, 0), margin, margin, (0, 0)))
  shifted = lambda i, j: padded[:, i : i + side, j : j + side] * kernel_KxKx1xC[i, j][None, None]
  summed = functools.reduce(jnp.add, (shifted(i, j) for i in range(k) for j in range(k)))
  return summed.reshape(B, P, C)


def convolution(x_BxHxWxC: jax.Array, kernel_KxKxCxD: jax.Array, stride: int = 1) -> jax.Array:
  """k×k convolution with zero padding, at every `stride`-th position."""
  return jax.lax.conv_general_dilated(
    x_BxHxWxC, kernel_KxKxCxD, (stride, stride), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )


# --- linear layers --------------------------------------------------------------------------------


def init(
  key: jax.Array, kernel: tuple[int, ...], bias: tuple[int, ...], fan_in: int, kind: str = 'lecun'
) -> Params:
  """A kernel of normal numbers times a scale, or of zeros ("zero"), and a zero bias.

  The scale is min(2/√fan_in, 0.1) ("kaiming"), min(1/√fan_in, 0.1) ("lecun") or 0.1 ("constant").

  >>> jax.tree.map(jnp.shape, init(jax.random.key(0), (3, 4), (4,), 3))
  {'bias': (4,), 'kernel': (3, 4)}
  """
  scale = {
    'kaiming': min(2 / fan_in**0.5, 0.1),
    'lecun': min(1 / fan_in**0.5, 0.1),
    'constant': 0.1,
    'zero': 0.0,
  }[kind]
  random = scale * jax.random.normal(key, kernel) if scale else jnp.zeros(kernel)
  return {'kernel': random, 'bias': jnp.zeros(bias)}


def affine(
  linear: Callable, params: Params, x: jax.Array, feedback: Any = None, dtype: Any = None
) -> jax.Array:
  """linear(x, kernel) + bias.

  Args:
    linear: `dense`, `grouped`, `across_tokens`, `depthwise`, `convolution`, or another product.
    feedback: {'kernel'} for gradients sent to x, or nothing.
    dtype: in which to compute; None: that of the arguments.
  """
  kernel, bias = params['kernel'], params['bias']
  if dtype:
    x, kernel, bias = x.astype(dtype), kernel.astype(dtype), bias.astype(dtype)
  back = feedback['kernel'].astype(kernel.dtype) if feedback else None
  out = linear(x, kernel) if back is None else with_feedback(linear, x, kernel, back)
  return out + jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))


def layer(
  variables: Variables, name: str, linear: Callable, x: jax.Array, dtype: Any = None
) -> jax.Array:
  """A block's layer `name`, as `affine`, with its feedback matrices if there are any."""
  feedback = variables.get('feedback', {}).get(name)
  return affine(linear, variables['params'][name], x, feedback, dtype)


def stacked(init_one: Callable[[jax.Array], Any], key: jax.Array, count: int) -> Any:
  """Parameters of `count` equal blocks, stacked along the first axis."""
  return jax.vmap(init_one)(jax.random.split(key, count))


# --- feedback -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_feedback(
  linear: Callable, x: jax.Array, kernel: jax.Array, feedback: jax.Array
) -> jax.Array:
  """linear(x, kernel), with `feedback` in place of the kernel in the gradient with respect to x."""
  del feedback
  return linear(x, kernel)


def _feedback_forward(
  linear: Callable, x: jax.Array, kernel: jax.Array, feedback: jax.Array
) -> tuple[jax.Array, tuple]:
  return linear(x, kernel), (x, kernel, feedback)


def _feedback_backward(linear: Callable, residuals: tuple, ct: jax.Array) -> tuple[jax.Array, ...]:
  x, kernel, feedback = residuals
  (d_kernel,) = jax.vjp(lambda k: linear(x, k), kernel)[1](ct)
  d_x = _carried_back(linear, feedback, ct, x)
  return d_x, d_kernel, jnp.zeros_like(feedback)


with_feedback.defvjp(_feedback_forward, _feedback_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _carried_back(linear: Callable, feedback: jax.Array, ct: jax.Array, x: jax.Array) -> jax.Array:
  """The cotangent of the layer's input, of x's shape.

  Its own derivative, from which feedback is learned (see `control_variates`), is with respect to the matrix
  only: layers learn one by one. If there are many patches, a subset is used; over a batch, the sum
  still has enough terms.
  """
  (d_x,) = jax.vjp(lambda x: linear(x, feedback), x)[1](ct)
  return d_x


def _learn_forward(
  linear: Callable, feedback: jax.Array, ct: jax.Array, x: jax.Array
) -> tuple[jax.Array, tuple]:
  return _carried_back(linear, feedback, ct, x), (feedback, ct, x)


def _learn_backward(linear: Callable, residuals: tuple, moved: jax.Array) -> tuple[jax.Array, ...]:
  """moved · (Fᵀ ct) = (F moved) · ct, so the gradient of F is a kernel's, for the input `moved`."""
  feedback, ct, x = residuals
  is_by_patch = linear in (dense, grouped)
  stride = LEARNING_STRIDE if is_by_patch and moved.shape[1] > LEARNING_STRIDE**2 else 1
  moved, some_ct = moved[:, ::stride], ct[:, ::stride]
  (d_feedback,) = jax.vjp(lambda f: linear(moved, f), feedback)[1](some_ct)
  return d_feedback, jnp.zeros_like(ct), jnp.zeros_like(x)


_carried_back.defvjp(_learn_forward, _learn_backward)


def like_kernels(key: jax.Array, params: Any) -> Any:
  """Fixed feedback matrices: for every `kernel` in `params`, a normal matrix of the same scale.

  The scale is the standard deviation of the kernel's initial entries; for a zero kernel (read-out),
  it is 1/√fan_in. The result contains only kernels.
  """
  paths_leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  kernels = [(path, leaf) for path, leaf in paths_leaves if path[-1].key == 'kernel']
  out: dict = {}
  for k, (path, leaf) in zip(jax.random.split(key, len(kernels)), kernels, strict=True):
    scale = jnp.where(leaf.std() > 0, leaf.std(), leaf.shape[-2] ** -0.5)
    node = functools.reduce(lambda d, p: d.setdefault(p.key, {}), path[:-1], out)
    node['kernel'] = scale * jax.random.normal(k, leaf.shape, leaf.dtype)
  return out


# --- local heads and the ends of a network --------------------------------------------------------


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


def losses(
  variables: Variables, heads: Heads, features: jax.Array, targets: Targets, cut: Cut | None
) -> jax.Array | None:
  """The local losses of a block's features [B, P, G, C], as in `Heads.losses`; None without a cut."""
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
  return layer(variables, 'linear', dense, features), features, {}


def _mean_feature(x: jax.Array) -> jax.Array:
  """[B, C] of [B, ..., C]."""
  mean_BxC = upcast(x).reshape(x.shape[0], -1, x.shape[-1]).mean(1)
  return layer_norm(mean_BxC).astype(x.dtype)


def init_projection(key: jax.Array, width: int, heads: Heads, kind: str = 'lecun') -> PyTree:
  """Parameters of `projection`."""
  outputs = heads.outputs(0)
  return {'linear': init(key, (width, outputs), (outputs,), width, kind)}


def projection(
  heads: Heads, variables: Variables, x: jax.Array, weight_B: jax.Array
) -> tuple[jax.Array, jax.Array, Variables]:
  """Mean over positions → norm → linear, for `StagedModel.project`: anchors and candidates."""
  del weight_B
  z_BxK = layer(variables, 'linear', dense, _mean_feature(x))
  return z_BxK, candidates(z_BxK, heads), {}


def candidates(z_BxK: jax.Array, heads: Heads) -> jax.Array:
  """What anchors are compared with: the same projections, behind a stop-gradient if there is one."""
  assert heads.contrast
  return jax.lax.stop_gradient(z_BxK) if heads.contrast.stop_gradient else z_BxK

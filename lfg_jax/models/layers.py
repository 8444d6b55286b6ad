"""The layers of a LocalMixer: norms without parameters, linear maps, fixed feedback matrices.

If the collection `feedback` has a fixed random matrix for a linear layer, that matrix replaces the
kernel when gradients are sent to the layer's input (feedback alignment, Lillicrap et al. 2016).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from lfg_jax.promotion import upcast

EPSILON = 1e-5
LEARNING_STRIDE = 5  # between the patches used to learn feedback; must not divide a row's length
RUNNING = 0.9  # weight of the past in running statistics, per step


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


class Norm(nn.Module):
  """`layer` (last axis), `whole` (all axes of an example) or `batch` norm.

  Batch norm uses running statistics when not training.
  """

  kind: str
  train: bool = True
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array, weight_B: jax.Array) -> jax.Array:
    """x [B, ..., C]; weight_B is zero for examples that pad the batch."""
    if self.kind == 'layer':
      return layer_norm(x)
    if self.kind == 'whole':
      return layer_norm(x, tuple(range(1, x.ndim)))
    return self._batch_norm(x, weight_B)

  def _batch_norm(self, x: jax.Array, weight_B: jax.Array) -> jax.Array:
    """Batch norm with the statistics of the global batch.

    They are sums over devices, which may have different numbers of real examples, or none.
    (`nn.BatchNorm` averages the devices' means, and divides 0 by 0 if a device has only padding.)
    """
    # x is [B, C], [B, P, C] or, in groups, [B, P, G, C].
    channels = math.prod(x.shape[2:] or x.shape[1:])
    flat_BxNxC = upcast(x).reshape(x.shape[0], -1, channels)
    running = [
      self.variable('batch_stats', name, fill, flat_BxNxC.shape[-1:], jnp.float32)
      for name, fill in (('mean', jnp.zeros), ('var', jnp.ones))
    ]
    if not self.train:
      mean, variance = (r.value for r in running)
    else:
      over_devices = None if self.is_initializing() else self.axis_name
      total = lambda a: jax.lax.psum(a, over_devices) if over_devices else a
      # Not in x's dtype: in bfloat16, 359 examples would be 360.
      real_Bx1x1 = (weight_B > 0).astype(flat_BxNxC.dtype)[:, None, None]
      count = total(real_Bx1x1.sum() * flat_BxNxC.shape[1])
      mean = total((flat_BxNxC * real_Bx1x1).sum((0, 1))) / count
      variance = total(((flat_BxNxC - mean[None, None]) ** 2 * real_Bx1x1).sum((0, 1))) / count
      if not self.is_initializing() and self.is_mutable_collection('batch_stats'):
        for r, new in zip(running, (mean, variance), strict=True):
          r.value = RUNNING * r.value + (1 - RUNNING) * jax.lax.stop_gradient(new)
    normalised = (flat_BxNxC - mean[None, None]) * jax.lax.rsqrt(variance + EPSILON)[None, None]
    return normalised.astype(x.dtype).reshape(x.shape)


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

  Its own derivative, from which feedback is learned (see `guesses`), is with respect to the matrix
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


def initializer(kind: str, fan_in: int) -> Callable:
  """Normal numbers times a scale, or zeros ("zero").

  The scale is min(2/√fan_in, 0.1) ("kaiming"), min(1/√fan_in, 0.1) ("lecun") or 0.1 ("constant").
  """
  if kind == 'zero':
    return nn.initializers.zeros_init()
  scale = {
    'kaiming': min(2 / fan_in**0.5, 0.1),
    'lecun': min(1 / fan_in**0.5, 0.1),
    'constant': 0.1,
  }[kind]
  return nn.initializers.normal(scale)


class Linear(nn.Module):
  """linear(x, kernel) + bias, with the feedback matrix if there is one.

  Attributes:
    linear: one of `dense`, `grouped`, `across_tokens`, `depthwise`.
    kernel_shape, bias_shape: bias_shape broadcasts with the output.
    fan_in: inputs per output, for the initial scale.
    dtype: in which to compute; None: that of inputs and parameters.
  """

  linear: Callable
  kernel_shape: tuple[int, ...]
  bias_shape: tuple[int, ...]
  fan_in: int
  init_kind: str = 'lecun'
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param('kernel', initializer(self.init_kind, self.fan_in), self.kernel_shape)
    bias = self.param('bias', nn.initializers.zeros_init(), self.bias_shape)
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
    if self.has_variable('feedback', 'kernel'):
      feedback: jax.Array = self.get_variable('feedback', 'kernel').astype(kernel.dtype)
      out = with_feedback(self.linear, x, kernel, feedback)
    else:
      out = self.linear(x, kernel)
    return out + jnp.expand_dims(bias, tuple(range(out.ndim - bias.ndim)))


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

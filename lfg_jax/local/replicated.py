"""Local losses, one for every block × patch × channel group, at the cost of one.

A head's first layer is linear in the aggregated feature x̄ = (1/P) Σ_p concat_g(x_{p,g}) of the
whole block: z = W x̄. Any loss L(z) per row of outputs may follow, with or without a hidden layer.
An example's loss has P·G replicas. Each sees x̄, with everything except its own x_{p,g} behind a
stop-gradient (Ren et al. 2023, section 3.2 and figure 2). All replicas of an example have the same
value, but different derivatives:

    dL[b,p,g] = (1/P) Σ_c dx[b,p,g,c] · (W_g ∂L/∂z_b)_c

Summed over p and g, this is the derivative of the plain loss. A naive implementation stores P·G
copies of x̄. Here the value is computed once, with its slope ∂L/∂z from `jax.vjp`, and the rule
above serves forward mode and, transposed by JAX, reverse mode. For the cross-entropy, ∂L/∂z is
softmax - onehot.

If the loss of a row also depends on other rows, like InfoNCE without its stop-gradient, a row has
no slope of its own. Then L is differentiated along each replica's own (1/P) W_gᵀ dx[·,p,g], one
patch at a time, because dz of all replicas would be larger than the features.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from lfg_jax.local.row_losses import RowLoss
from lfg_jax.local.targets import Targets

PyTree = Any


class Cut(NamedTuple):
  """Which axes of a block's features have their own losses (figure 6 of the paper)."""

  patch: bool = True
  group: bool = True

  def replicas(self, features_BxPxGxC: jax.Array) -> int:
    """Number of losses per example: P·G with both cuts."""
    _, P, G, _ = features_BxPxGxC.shape
    return (P if self.patch else 1) * (G if self.group else 1)


@jax.custom_jvp
def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
  """x, with its derivative multiplied by the constant `scale`.

  >>> jax.grad(lambda x: scale_gradient(x, 0.5) ** 2)(3.0).item()
  3.0
  """
  del scale
  return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  return primals[0], tangents[0] * primals[1]


def head_outputs(
  features_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array
) -> jax.Array:
  """[B, K]: a head's first layer, applied to the mean over patches of all groups."""
  G, C, K = kernel_GxCxK.shape
  mean_BxD = features_BxPxGxC.mean(1, dtype=kernel_GxCxK.dtype).reshape(-1, G * C)
  return mean_BxD @ kernel_GxCxK.reshape(G * C, K) + bias_K[None]


def own_slopes(d_BxPxGxC: jax.Array, slope_BxGxC: jax.Array, cut: Cut) -> jax.Array:
  """[B, P, G]: the change of each replica's loss when its own features move along d.

  The sum has two steps, because on CPUs XLA stores all products before summing more than 32.
  """
  C = d_BxPxGxC.shape[-1]
  part = 16 if C % 16 == 0 else C
  in_parts = lambda x: x.reshape(*x.shape[:-1], C // part, part)
  return sum_uncut((in_parts(d_BxPxGxC) * in_parts(slope_BxGxC)[:, None]).sum(-1).sum(-1), cut)


def sum_uncut(x: jax.Array, cut: Cut) -> jax.Array:
  """x [B, P, G, ...], summed (to size 1) over the axes of P and G that are not cut."""
  axes = tuple(axis for axis, own in ((1, cut.patch), (2, cut.group)) if not own)
  return x.sum(axes, keepdims=True) if axes else x


def replicate(loss_B: jax.Array, P: int, G: int, cut: Cut) -> jax.Array:
  """[B, P, G] copies (size 1 for an axis that is not cut)."""
  shape = (loss_B.shape[0], P if cut.patch else 1, G if cut.group else 1)
  return jnp.broadcast_to(loss_B[:, None, None], shape)


class _Form(NamedTuple):
  """The static arguments: `loss(outputs_BxK, above, targets) -> [B]`, and how to replicate it."""

  loss: Callable[[jax.Array, PyTree, PyTree], jax.Array]
  cut: Cut
  mixes_rows: bool


def _value(
  form: _Form,
  features_BxPxGxC: jax.Array,
  kernel_GxCxK: jax.Array,
  bias_K: jax.Array,
  above: PyTree,
  backward_GxCxK: jax.Array,
  targets: PyTree,
) -> jax.Array:
  del backward_GxCxK
  _, P, G, _ = features_BxPxGxC.shape
  z_BxK = head_outputs(features_BxPxGxC, kernel_GxCxK, bias_K)
  return replicate(form.loss(z_BxK, above, targets), P, G, form.cut)


_fused = jax.custom_jvp(_value, nondiff_argnums=(0,))


@functools.partial(_fused.defjvp, symbolic_zeros=True)
def _fused_jvp(form: _Form, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  features, kernel, bias, above, backward, targets = primals
  d_features, d_kernel, d_bias, d_above, *_ = tangents
  _, P, G, _ = features.shape
  z_BxK = head_outputs(features, kernel, bias)
  loss_of_z = lambda z: form.loss(z, above, targets)
  if form.mixes_rows:
    loss_B, along = jax.linearize(loss_of_z, z_BxK)
    d_loss = _own_and_others(along, _filled(d_features), backward, form.cut)
  else:
    loss_B, pull = jax.vjp(loss_of_z, z_BxK)
    (slope_BxK,) = pull(jnp.ones_like(loss_B))
    along = lambda d_BxK: (d_BxK * slope_BxK).sum(-1)
    slope_BxGxC = jnp.einsum('gck,bk->bgc', backward, slope_BxK) / P
    d_loss = own_slopes(_filled(d_features), slope_BxGxC, form.cut)
  # If only activities move, there is no product with the head's zero tangent.
  if _moves((d_kernel, d_bias)):
    d_z_BxK = head_outputs(features, _filled(d_kernel), _filled(d_bias))
    d_loss += along(d_z_BxK)[:, None, None]
  if _moves(d_above):
    loss_of_above = lambda above: form.loss(z_BxK, above, targets)
    d_B = jax.jvp(loss_of_above, (above,), (jax.tree.map(_filled, d_above, is_leaf=_is_zero),))[1]
    d_loss += d_B[:, None, None]
  return replicate(loss_B, P, G, form.cut), d_loss


def _is_zero(d: jax.Array | SymbolicZero) -> bool:
  return isinstance(d, SymbolicZero)


def _moves(tree: PyTree) -> bool:
  return not all(map(_is_zero, jax.tree.leaves(tree, is_leaf=_is_zero)))


def _filled(d: jax.Array | SymbolicZero) -> jax.Array:
  return jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d


def _own_and_others(
  along: Callable[[jax.Array], jax.Array], d_BxPxGxC: jax.Array, backward_GxCxK: jax.Array, cut: Cut
) -> jax.Array:
  """[B, P, G]: the change of each replica's loss due to its own features in all rows."""
  P = d_BxPxGxC.shape[1]

  def one_patch(d_BxGxC: jax.Array) -> jax.Array:
    moved_BxGxK = jnp.einsum('bgc,gck->bgk', d_BxGxC, backward_GxCxK) / P
    if not cut.group:
      moved_BxGxK = moved_BxGxK.sum(1, keepdims=True)
    return jax.vmap(along, 1, 1)(moved_BxGxK)

  d_PxBxGxC = jnp.moveaxis(d_BxPxGxC if cut.patch else d_BxPxGxC.sum(1, keepdims=True), 1, 0)
  return jnp.moveaxis(jax.lax.map(one_patch, d_PxBxGxC), 0, 1)


def check_shapes(
  features_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array, targets: Targets
) -> None:
  """Raises AssertionError, saying what was expected, if the arguments' shapes do not match."""
  chex.assert_rank([features_BxPxGxC, kernel_GxCxK], [4, 3])
  B, _, G, C = features_BxPxGxC.shape
  chex.assert_shape(
    kernel_GxCxK, (G, C, None), custom_message='the head needs a row for every group and channel'
  )
  chex.assert_shape(
    bias_K, kernel_GxCxK.shape[-1:], custom_message='the bias has one entry per output of the head'
  )
  chex.assert_shape([*targets], (B,), custom_message='one entry per example')


def replicated_loss(
  row_loss: RowLoss,
  features_BxPxGxC: jax.Array,
  head: dict[str, Any],
  targets: Targets,
  cut: Cut = Cut(),
  *,
  feedback: dict[str, Any] | None = None,
  mixes_rows: bool = False,
) -> jax.Array:
  """The loss of a head on the mean feature, with one replica per patch and group.

  Time and memory are those of the plain loss, independent of P·G.

  Args:
    row_loss: the loss of the head's outputs; see `row_losses`.
    features_BxPxGxC: normalised output of the block, in groups.
    head: 'kernel' [G, C, K] and 'bias' [K], shared by patches; row g of the kernel belongs to group
      g. With a hidden layer also 'out', with 'kernel' [K, L] and 'bias' [L], after a ReLU.
    targets: one entry per example.
    cut: which axes have their own losses; the others have size 1 in the result.
    feedback: fixed kernels that replace the head's in derivatives with respect to their inputs
      (feedback alignment).
    mixes_rows: whether a row's loss also depends on other rows' outputs.

  Returns:
    [B, P, G] (size 1 for an axis that is not cut), in the row loss's unit.

  >>> from lfg_jax.local.row_losses import cross_entropy
  >>> x, head = jnp.ones((2, 4, 3, 5)), {'kernel': jnp.ones((3, 5, 10)), 'bias': jnp.zeros(10)}
  >>> loss = replicated_loss(cross_entropy, x, head, Targets(jnp.array([1, 2]), jnp.ones(2)))
  >>> loss.shape, round(float(loss[0, 0, 0]), 4)
  ((2, 4, 3), 2.3026)
  """
  kernel, bias, feedback = head['kernel'], head['bias'], feedback or {}
  check_shapes(features_BxPxGxC, kernel, bias, targets)
  above = (head['out'], feedback.get('out')) if 'out' in head else ()

  def loss(z_BxK: jax.Array, above: tuple, targets: Targets) -> jax.Array:
    return row_loss(_behind_relu(z_BxK, *above) if above else z_BxK, targets)

  return _fused(
    _Form(loss, cut, mixes_rows),
    features_BxPxGxC,
    kernel,
    bias,
    above,
    feedback.get('kernel', kernel),
    targets,
  )


def _behind_relu(z_BxK: jax.Array, layer: dict[str, jax.Array], feedback: dict | None) -> jax.Array:
  """The layer after the hidden one. Its input's derivative goes through the feedback, if any."""
  h_BxK = jax.nn.relu(z_BxK)
  if not feedback:
    return h_BxK @ layer['kernel'] + layer['bias'][None]
  still_BxK = jax.lax.stop_gradient(h_BxK)
  moving_BxL = (h_BxK - still_BxK) @ jax.lax.stop_gradient(feedback['kernel'])  # zero
  return still_BxK @ layer['kernel'] + moving_BxL + layer['bias'][None]

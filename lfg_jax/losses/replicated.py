"""Local losses, one for every block × patch × channel group, fused so that replication costs nothing.

Each of the P·G replicas of an example's loss sees the aggregated feature x̄ = (1/P) Σ_p concat_g(x_{p,g}) of
the whole block, but only its own x_{p,g} without a stop-gradient (Ren et al. 2023, section 3.2 and figure 2).
All replicas of an example have the same value; their derivatives differ:

    dL[b,p,g] = (1/P) Σ_c dx[b,p,g,c] · (W_g (softmax - onehot)_b)_c

Summed over p and g this is the derivative of the plain loss. Stored naively it takes P·G copies of x̄; here
the value is computed once, and the rule above serves forward mode and, transposed by JAX, reverse mode.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Cut(NamedTuple):
  """Which axes of a block's features have a loss of their own (figure 6 of the paper)."""
  patch: bool = True
  group: bool = True

  def replicas(self, features_BxPxGxC: jax.Array) -> int:
    """Number of losses per example: P·G when both cuts are made."""
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


def cross_entropy(logits_BxK: jax.Array, label_B: jax.Array) -> jax.Array:
  """[B] cross-entropy with integer labels, in nats."""
  return optax.softmax_cross_entropy_with_integer_labels(logits_BxK, label_B)


def head_outputs(features_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array) -> jax.Array:
  """[B, K]: the head on the mean over patches of all groups."""
  G, C, K = kernel_GxCxK.shape
  mean_BxD = features_BxPxGxC.mean(1, dtype=kernel_GxCxK.dtype).reshape(-1, G * C)
  return mean_BxD @ kernel_GxCxK.reshape(G * C, K) + bias_K[None]


def own_slopes(d_BxPxGxC: jax.Array, slope_BxGxC: jax.Array, cut: Cut) -> jax.Array:
  """[B, P, G]: what each replica's own features add to its loss when they move along d.

  Summed in two steps: on CPUs, XLA would write out all products before a sum of more than 32.
  """
  C = d_BxPxGxC.shape[-1]
  part = 16 if C % 16 == 0 else C
  in_parts = lambda x: x.reshape(*x.shape[:-1], C // part, part)
  return sum_uncut((in_parts(d_BxPxGxC) * in_parts(slope_BxGxC)[:, None]).sum(-1).sum(-1), cut)


def sum_uncut(x: jax.Array, cut: Cut) -> jax.Array:
  """x [B, P, G, ...], summed, to size 1, over those of the axes P and G that are not cut."""
  axes = tuple(axis for axis, own in ((1, cut.patch), (2, cut.group)) if not own)
  return x.sum(axes, keepdims=True) if axes else x


def replicate(loss_B: jax.Array, P: int, G: int, cut: Cut) -> jax.Array:
  """[B, P, G] copies (1 in place of an axis that is not cut)."""
  return jnp.broadcast_to(loss_B[:, None, None], (loss_B.shape[0], P if cut.patch else 1, G if cut.group else 1))


def _fused(features_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array, backward_GxCxK: jax.Array,
           label_B: jax.Array, cut: Cut) -> jax.Array:
  _, P, G, _ = features_BxPxGxC.shape
  return replicate(cross_entropy(head_outputs(features_BxPxGxC, kernel_GxCxK, bias_K), label_B), P, G, cut)


_fused_loss = jax.custom_jvp(_fused, nondiff_argnums=(5,))


@_fused_loss.defjvp
def _fused_jvp(cut: Cut, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
  features, kernel, bias, backward, label = primals
  d_features, d_kernel, d_bias, _, _ = tangents
  P, G = features.shape[1:3]
  logits_BxK = head_outputs(features, kernel, bias)
  loss = replicate(cross_entropy(logits_BxK, label), P, G, cut)
  error_BxK = jax.nn.softmax(logits_BxK) - jax.nn.one_hot(label, bias.shape[0], dtype=logits_BxK.dtype)
  slope_BxGxC = jnp.einsum('gck,bk->bgc', backward, error_BxK) / P
  d_own = own_slopes(d_features, slope_BxGxC, cut)
  d_head_B = (head_outputs(features, d_kernel, d_bias) * error_BxK).sum(-1)
  return loss, d_own + d_head_B[:, None, None]


def check_shapes(features_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array, rows_B: jax.Array) -> None:
  """Raises AssertionError, saying what was expected, if the arguments of a replicated loss do not fit together."""
  chex.assert_rank([features_BxPxGxC, kernel_GxCxK], [4, 3])
  B, _, G, C = features_BxPxGxC.shape
  chex.assert_shape(kernel_GxCxK, (G, C, None), custom_message='the head needs a row for every group and channel')
  chex.assert_shape(bias_K, kernel_GxCxK.shape[-1:], custom_message='the bias has one entry per output of the head')
  chex.assert_shape(rows_B, (B,), custom_message='one entry per example')


def replicated_cross_entropy(features_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array, bias_K: jax.Array,
                             label_B: jax.Array, cut: Cut = Cut(), *,
                             backward_GxCxK: jax.Array | None = None,
                             held_BxPxGxC: jax.Array | None = None) -> jax.Array:
  """Cross-entropy of a linear head on the mean feature, with one replica per cut of patch and group.

  Time and memory are those of the plain loss: independent of P·G.

  Args:
    features_BxPxGxC: normalised output of the block, in groups.
    kernel_GxCxK, bias_K: the head, shared by patches; row g of the kernel belongs to group g.
    label_B: integer classes.
    cut: an axis that is not cut has size 1 in the result.
    backward_GxCxK: fixed matrix used in place of the kernel in derivatives with respect to the features
      (feedback alignment).
    held_BxPxGxC: the value of the copies behind the stop-gradient; by default that of the features. To be
      given where `features` is *evaluated* at a perturbed point (finite differences): replicas then differ.

  Returns:
    [B, P, G] (1 in place of an axis that is not cut), in nats.

  >>> x, w = jnp.ones((2, 4, 3, 5)), jnp.ones((3, 5, 10))
  >>> loss = replicated_cross_entropy(x, w, jnp.zeros(10), jnp.array([1, 2]))
  >>> loss.shape, round(float(loss[0, 0, 0]), 4)
  ((2, 4, 3), 2.3026)
  """
  check_shapes(features_BxPxGxC, kernel_GxCxK, bias_K, label_B)
  if held_BxPxGxC is not None:
    return _displaced_loss(features_BxPxGxC, held_BxPxGxC, kernel_GxCxK, bias_K, label_B, cut)
  backward = kernel_GxCxK if backward_GxCxK is None else backward_GxCxK
  return _fused_loss(features_BxPxGxC, kernel_GxCxK, bias_K, backward, label_B, cut)


def _displaced_loss(features_BxPxGxC: jax.Array, held_BxPxGxC: jax.Array, kernel_GxCxK: jax.Array,
                    bias_K: jax.Array, label_B: jax.Array, cut: Cut) -> jax.Array:
  """Replicas at a point where each sees its own features displaced and all others held; O(B·P·G·K) memory."""
  P = features_BxPxGxC.shape[1]
  step_BxPxGxK = jnp.einsum('bpgc,gck->bpgk', features_BxPxGxC - held_BxPxGxC, kernel_GxCxK) / P
  logits = head_outputs(held_BxPxGxC, kernel_GxCxK, bias_K)[:, None, None] + sum_uncut(step_BxPxGxK, cut)
  return cross_entropy(logits, jnp.broadcast_to(label_B[:, None, None], logits.shape[:-1]))

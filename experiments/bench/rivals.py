"""Published gradient estimators as pure functions, to be compared with those of the package.

Each is made for a loss or a network, and is then `(params, *args, key) -> (value, gradient)`.

| function | estimator | source |
|---|---|---|
| `two_sided` | SPSA: two-sided differences along random signs | Spall 1992, IEEE TAC 37(3) |
| `seeded` | MeZO: the same along normal tangents drawn again from a seed | Malladi et al. 2023, arXiv 2305.17333 |
| `antithetic` | evolution strategies with mirrored samples | Salimans et al. 2017, arXiv 1703.03864 |
| `feedback_alignment` | backprop through fixed random matrices | Lillicrap et al. 2016, arXiv 1411.0247 |
| `direct_feedback` | the output error, through a random matrix per layer | Nøkland 2016, arXiv 1609.01596 |
| `mirrored` | a weight mirror's matrices, as a control variate | Akrout et al. 2019, arXiv 1904.05391 |
| `uoro` | real-time recurrent learning of rank one | Tallec and Ollivier 2017, arXiv 1702.05043 |
| `forward_grad` along whole sequences (in the package) | DODGE with random directions | Silver et al. 2021, ICLR 2022 |
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax import value_and_activity_grad
from lfg_jax.estimators import control_variates, feedback
from lfg_jax.tangents import distributions, sampling

PyTree = Any
Estimator = Callable[..., tuple[Any, PyTree]]


def two_sided(
  loss: Callable,
  step: float = 1e-3,
  distribution: distributions.Distribution = distributions.rademacher,
) -> Estimator:
  """(L(w + εu) - L(w - εu)) / 2ε · u. For signs u, the division by u of SPSA is this product."""

  def run(params: PyTree, *args: Any, key: jax.Array) -> tuple[jax.Array, PyTree]:
    u = jax.tree.map(
      lambda leaf: leaf[0],
      distributions.like_tree(distribution, key, params, distributions.Chunk(1)),
    )
    at = lambda t: loss(jax.tree.map(lambda w, u: w + t * u, params, u), *args)
    above, below = at(step), at(-step)
    slope = (above - below) / (2 * step)
    return (above + below) / 2, jax.tree.map(lambda u: slope * u, u)

  return run


def seeded(loss: Callable, step: float = 1e-3) -> Estimator:
  """Like `two_sided` with normal tangents, none of which is kept: each use draws them again."""

  def moved(params: PyTree, key: jax.Array, t: float) -> PyTree:
    u = distributions.like_tree(distributions.normal, key, params, distributions.Chunk(1))
    return jax.tree.map(lambda w, u: w + t * u[0], params, u)

  def run(params: PyTree, *args: Any, key: jax.Array) -> tuple[jax.Array, PyTree]:
    above = loss(moved(params, sampling.after(key, None), step), *args)
    below = loss(moved(params, sampling.after(key, above), -step), *args)
    slope = (above - below) / (2 * step)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return (above + below) / 2, moved(zeros, sampling.after(key, slope), slope)

  return run


def antithetic(loss: Callable, pairs: int, sigma: float = 0.02) -> Estimator:
  """The mean over mirrored pairs: the gradient of the loss smoothed by N(0, σ²)."""
  one = two_sided(loss, sigma, distributions.normal)

  def run(params: PyTree, *args: Any, key: jax.Array) -> tuple[jax.Array, PyTree]:
    each = jax.vmap(lambda key: one(params, *args, key=key))(jax.random.split(key, pairs))
    return jax.tree.map(lambda x: x.mean(0), each)

  return run


@jax.custom_vjp
def linear(x: jax.Array, w: jax.Array, back: jax.Array) -> jax.Array:
  """x @ w; in the reverse sweep, `back` stands in for w."""
  del back
  return x @ w


linear.defvjp(
  lambda x, w, back: (x @ w, (x, back)),
  lambda kept, g: (g @ kept[1].T, kept[0].T @ g, jnp.zeros_like(kept[1])),
)


def feedback_alignment(losses: Callable, back: PyTree) -> Estimator:
  """Backprop of `losses(params, *args, back)`, whose layers are `linear`. Biased."""

  def run(params: PyTree, *args: Any, key: jax.Array) -> tuple[jax.Array, PyTree]:
    del key
    return jax.value_and_grad(lambda params: losses(params, *args, back).mean())(params)

  return run


def direct_feedback(network: Callable, matrices: dict[str, jax.Array]) -> Estimator:
  """Direct feedback alignment of `network(params, *args) -> (losses, d loss / d output)`. Biased."""

  def weighted(params: PyTree, *args: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    losses, error = network(params, *args)
    return losses / len(losses), {'output_error': error / len(losses)}

  estimate = feedback.direct_feedback(weighted, matrices=matrices)

  def run(params: PyTree, *args: Any, key: jax.Array) -> tuple[jax.Array, PyTree]:
    (losses, _), gradient = estimate(params, key, *args)
    return losses.sum(), gradient

  return run


def mirror(params: PyTree, key: jax.Array, samples: int) -> PyTree:
  """What weight mirrors learn from noise x: the mean of x (x W)ᵀ, transposed, is W."""

  def one(n: int, w: jax.Array) -> jax.Array:
    x_SxI = jax.random.normal(jax.random.fold_in(key, n), (samples, w.shape[0]))
    return x_SxI.T @ (x_SxI @ w) / samples

  leaves, treedef = jax.tree.flatten(params)
  return jax.tree.unflatten(treedef, [one(n, w) for n, w in enumerate(leaves)])


def mirrored(losses: Callable, back: PyTree, names: tuple[str, ...], **options: Any) -> Estimator:
  """Forward gradients at the taps, less noisy by the control variate that comes back through `back`."""

  def weighted(back: PyTree, params: PyTree, *args: Any) -> tuple[jax.Array, dict]:
    each = losses(params, *args, back)
    return each / len(each), {}

  def control_variate(activities: Any, params: PyTree, *args: Any) -> dict[str, jax.Array]:
    del activities
    return control_variates.cotangents(
      control_variates.Learned(back, weighted), back, names, params, *args
    )

  return value_and_activity_grad(losses, joint=False, control_variate=control_variate, **options)


def uoro(cell: Callable, loss_at: Callable, start: Callable) -> Estimator:
  """Unbiased online recurrent optimization, one example at a time.

  The derivative ∂s/∂w of the state is replaced with a product of two vectors, s̃ w̃ᵀ, whose mean it
  is. With random signs ν and any ρ₀, ρ₁ > 0, a step makes s̃ ← ρ₀ ∂s'/∂s s̃ + ρ₁ ν and
  w̃ ← w̃/ρ₀ + νᵀ ∂s'/∂w / ρ₁. These ρ balance the norms, which keeps the noise small.

  Args:
    cell: `(params, s, x) -> s`, for one example.
    loss_at: `(params, s, y) -> loss` of one step.
    start: `params -> s`.
  """
  norm = lambda tree: jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(tree)) + 1e-12)
  axpy = lambda a, x, y: jax.tree.map(lambda x, y: a * x + y, x, y)

  def of_example(params: PyTree, x_T: jax.Array, y_T: jax.Array, key: jax.Array) -> tuple:
    def step(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
      s, s_tilde, w_tilde, gradient = carry
      x, y, key = inputs
      nu = distributions.draw_signs(key, s.shape)
      s, moved = jax.jvp(lambda s: cell(params, s, x), (s,), (s_tilde,))
      (direct,) = jax.vjp(lambda params: cell(params, carry[0], x), params)[1](nu)
      rho_0 = jnp.sqrt(norm(w_tilde) / norm(moved)) + 1e-6
      rho_1 = jnp.sqrt(norm(direct) / norm(nu)) + 1e-6
      s_tilde = rho_0 * moved + rho_1 * nu
      w_tilde = axpy(1 / rho_0, w_tilde, jax.tree.map(lambda d: d / rho_1, direct))
      loss, (of_params, of_s) = jax.value_and_grad(loss_at, (0, 1))(params, s, y)
      gradient = axpy(jnp.vdot(of_s, s_tilde), w_tilde, axpy(1.0, of_params, gradient))
      return (s, s_tilde, w_tilde, gradient), loss

    zeros = jax.tree.map(jnp.zeros_like, params)
    first = start(params)
    carry = first, jnp.zeros_like(first), zeros, zeros
    (_, _, _, gradient), loss_T = jax.lax.scan(
      step, carry, (x_T, y_T, jax.random.split(key, len(x_T)))
    )
    return loss_T.sum(), gradient

  def run(params: PyTree, x_BxT: jax.Array, y_BxT: jax.Array, *, key: jax.Array) -> tuple:
    keys = jax.random.split(key, len(x_BxT))
    each = jax.vmap(of_example, (None, 0, 0, 0))(params, x_BxT, y_BxT, keys)
    return jax.tree.map(lambda x: x.mean(0), each)

  return run

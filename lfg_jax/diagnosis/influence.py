"""Which losses does a tap really influence? Derivatives along tangents with gaps tell.

Let a tap have axes [B, P, c] and the losses [B, P]. Take a random tangent that is zero in half of
the examples. If every activity influences only its own example's losses, the losses of these
examples have no derivative. If one does, examples mix. The same with half of the parts tests
axis 1. The halves are random, and each is used with its complement, so every second probe, on
average, separates any given pair of entries.

A derivative may be zero by accident: after a head that starts at zero, say, or a ReLU that is off.
So probes are also made near the point, with all differentiated arguments moved by a tenth of their
size. An influence seen nowhere is reported as such, not as right.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


class Declared(NamedTuple):
  """A tap before it is probed.

  Attributes:
    name: as in `value_and_activity_grad`.
    shape: as the function sees it, examples first.
    scanned: sizes of the scanned axes, which come before.
    dtype: of the activity.
    local_axes: as the tap declares it.
    credited: the local axes that the estimate uses: 0 where examples are declared or found to mix.
    reaches: names of the losses that the tap can influence, by the equations.
  """

  name: str
  shape: tuple[int, ...]
  scanned: tuple[int, ...]
  dtype: Any
  local_axes: int
  credited: int
  reaches: tuple[str, ...]

  @property
  def dimensions(self) -> int:
    """Number of perturbed dimensions to which one loss, or sum of losses, is credited."""
    return math.prod(self.scanned) * math.prod(self.shape[self.credited :])


class Seen(NamedTuple):
  """What probes of a tap at one point saw.

  Attributes:
    losses: names of the losses that have a derivative.
    mixed: axes along which the tap influences losses other than its own.
    own: axes that activity and losses share, so that losses can be its own.
    is_finite: whether all derivatives are finite.
  """

  losses: frozenset[str]
  mixed: frozenset[int]
  own: frozenset[int]
  is_finite: bool


class Influence(NamedTuple):
  """A tap's real influence on the losses, compared with what it declares.

  Attributes:
    declared: the tap.
    real: how many leading axes activity and losses really share; None: no influence was seen.
    verdict: in words; it begins with 'ok', 'too local', 'could be more local' or 'no influence'.
  """

  declared: Declared
  real: int | None
  verdict: str

  @property
  def is_wrong(self) -> bool:
    return self.verdict.startswith('too local') or 'nearby: too local' in self.verdict


def probe(
  derivative: Callable[[PyTree, list[jax.Array]], dict[str, jax.Array]],
  points: Sequence[PyTree],
  taps: Sequence[Declared],
  losses: dict[str, Any],
  key: jax.Array,
  probes: int,
) -> list[Influence]:
  """Probes every tap.

  Args:
    derivative: `(point, tangents [n, ...] of all taps) -> derivatives [n, ...] of losses by name`.
    points: the point itself, then points near it.
    losses: shapes of the losses, by name.
    probes: number of random halves for every tap and axis.
  """
  random = _generator(key)
  zeros = [jnp.zeros((2 * probes, *tap.scanned, *tap.shape), tap.dtype) for tap in taps]
  found = []
  for n, tap in enumerate(taps):
    alone = lambda u, point, n=n: derivative(point, [*zeros[:n], u, *zeros[n + 1 :]])
    seen = [
      _see(functools.partial(alone, point=point), tap, losses, random, probes) for point in points
    ]
    found.append(_judge(tap, seen[0], seen[1:]))
  return found


def moved(point: PyTree, key: jax.Array) -> PyTree:
  """A nearby point: every leaf moves by a tenth of its root mean square (of 1 if that is zero)."""
  random = _generator(key)

  def one(leaf: jax.Array) -> np.ndarray:
    values = np.asarray(leaf, np.float64)
    size = np.sqrt(np.square(values).mean()) or 1
    return (values + size / 10 * random.standard_normal(values.shape)).astype(jnp.result_type(leaf))

  return jax.tree.map(one, point)


def _generator(key: jax.Array) -> np.random.Generator:
  """Random numbers on the host, so that no program is compiled for every shape."""
  return np.random.default_rng(np.asarray(jax.random.key_data(key)))


def _see(
  derivative: Callable[[jax.Array], dict[str, jax.Array]],
  tap: Declared,
  losses: dict[str, Any],
  random: np.random.Generator,
  probes: int,
) -> Seen:
  """Probes of all axes at one point."""
  seen: set[str] = set()
  mixed: set[int] = set()
  own: set[int] = set()
  is_finite = True
  axes = min(len(tap.shape), max(loss.ndim for loss in losses.values()))
  for axis in range(max(axes, 1)):
    mask = _halves(random, tap.shape[axis], probes)
    along = [1] * len(tap.shape)
    along[axis] = -1
    u = random.standard_normal((2 * probes, *tap.scanned, *tap.shape))
    gaps = mask.reshape(len(mask), *[1] * len(tap.scanned), *along)
    for name, dL in derivative((u * gaps).astype(tap.dtype)).items():
      d = np.abs(np.asarray(dL, np.float64))
      is_finite &= bool(np.isfinite(d).all())
      if not d.any() or not is_finite:
        continue
      seen.add(name)
      if d.ndim - 1 <= axis or d.shape[1 + axis] == 1 or tap.shape[axis] == 1:
        continue
      (own if d.shape[1 + axis] == tap.shape[axis] else mixed).add(axis)
      if axis in own and _leaks(d, mask, axis, float(jnp.finfo(losses[name].dtype).eps)):
        mixed.add(axis)
  return Seen(frozenset(seen), frozenset(mixed), frozenset(own), is_finite)


def _halves(random: np.random.Generator, size: int, probes: int) -> np.ndarray:
  """[2 probes, size]: random halves of `size` entries, and their complements."""
  half = np.argsort(random.random((probes, size)), axis=1) < size // 2
  return np.concatenate([half, ~half])


def _leaks(d: np.ndarray, mask: np.ndarray, axis: int, eps: float) -> bool:
  """Whether losses depend on activities other than their own, beyond rounding."""
  others = ~mask.reshape(len(mask), *(-1 if a == axis else 1 for a in range(d.ndim - 1)))
  return bool((d * others).max() > 16 * eps * d.max())


def _judge(tap: Declared, here: Seen, near: Sequence[Seen]) -> Influence:
  near = [seen for seen in near if seen.is_finite]
  if not here.is_finite:
    return Influence(tap, None, 'no influence can be told: its derivatives are not finite')
  all_seen = [here, *near]
  losses = frozenset().union(*(seen.losses for seen in all_seen))
  if not losses:
    return Influence(tap, None, 'no influence seen')
  mixed = frozenset().union(*(seen.mixed for seen in all_seen))
  own = frozenset().union(*(seen.own for seen in all_seen))
  real = min(mixed, default=len(tap.shape))
  while real > tap.credited and real - 1 not in own:
    real -= 1
  verdict = _compare(tap, real, mixed, here.mixed)
  if not here.losses:
    return Influence(tap, real, f'no influence seen; nearby: {verdict}')
  missing = [name for name in tap.reaches if name not in losses]
  return Influence(
    tap, real, verdict + f', but no influence on {", ".join(missing)} seen' * bool(missing)
  )


def _compare(tap: Declared, real: int, mixed: frozenset[int], here: frozenset[int]) -> str:
  wrong = sorted(axis for axis in mixed if axis < tap.credited)
  if wrong:
    where = '' if set(wrong) & here else ' (near this point)'
    axes = ', '.join(map(str, wrong))
    return f'too local: declares local_axes={tap.credited}, influences along axis {axes}{where}'
  if math.prod(tap.shape[tap.credited : real]) > 1:
    option = f'local_axes={real} (of tap or mark)'
    option = 'mixes_examples=False' if real == tap.local_axes else option
    return f'could be more local: {option}'
  return 'ok'

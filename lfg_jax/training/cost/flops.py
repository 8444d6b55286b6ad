"""Time, memory and arithmetic of jitted functions, for programs that compare algorithms.

Other work on the machine slows down everything beside it. So the functions that are compared take
turns, repetition by repetition, together with a matrix product that measures the machine's own
rate. Ratios are then reliable even where times are not.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lfg_jax.local.lookahead import next_stacks
from lfg_jax.local.staged import StagedModel
from lfg_jax.training.rules.rules import Options, Rule

Name = TypeVar('Name', bound=Hashable)


def interleaved(
  functions: Mapping[Name, Callable[[], Any]], repetitions: int
) -> dict[Name, list[float]]:
  """Seconds of each repetition of each function.

  The functions take turns. One call of each before the first repetition is not counted.

  >>> sorted(interleaved({'a': lambda: jnp.ones(3), 'b': lambda: jnp.zeros(3)}, 2))
  ['a', 'b']
  """
  seconds: dict[Name, list[float]] = {name: [] for name in functions}
  for repetition in range(-1, repetitions):
    for name, function in functions.items():
      begin = time.perf_counter()
      jax.block_until_ready(function())
      if repetition >= 0:
        seconds[name].append(time.perf_counter() - begin)
  return seconds


def median_ms(seconds: Sequence[float]) -> float:
  """Median of times in seconds, converted to milliseconds.

  >>> median_ms([0.001, 0.5, 0.002])
  2.0
  """
  return 1e3 * statistics.median(seconds)


def one_ms(function: Callable[[], Any], repetitions: int = 3) -> float:
  """Median time of one function, in milliseconds.

  >>> one_ms(lambda: jnp.ones(3)) > 0
  True
  """
  return median_ms(interleaved({'': function}, repetitions)[''])


def temporaries(compiled: jax.stages.Compiled) -> int:
  """Bytes that a compiled function needs besides its arguments and results; 0: unknown."""
  analysis = compiled.memory_analysis()
  return int(analysis.temp_size_in_bytes) if analysis else 0


def matmul(dtype: Any = jnp.float32) -> tuple[Callable[[], jax.Array], int]:
  """A call that multiplies two square matrices, and its number of operations.

  The matrices are large enough to show the machine's matmul rate.
  """
  size = 1024 if jax.default_backend() == 'cpu' else 8192
  a, b = (
    jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0))
  )
  product = jax.jit(jnp.matmul)
  return lambda: product(a, b), 2 * size**3


def gradient_flop(model: StagedModel, rule: Rule, options: Options) -> int:
  """Operations per example that any program needs for a rule's gradient, not counting heads.

  F stands for all linear maps. F₁ stands for those whose input needs no derivative: the first map
  of the network or, if no gradient crosses blocks, the first map of every block.

  | estimator | value | derivatives | weights' gradients | sum |
  |---|---|---|---|---|
  | backprop | F | F - F₁ backward | F | 3 F - F₁ |
  | activity, K passes, taps joint | F | K (F - F₁) forward | F | (2 + K) F - K F₁ |
  | activity, one by one | F | K × all behind each tap, forward; 2 × the maps of guesses | F | |
  | weight, K passes | F | K (F - F₁) of inputs, K F of weights, forward | 0 | (1 + 2 K) F - K F₁ |
  | direct_feedback | F | 0 | F | 2 F |

  A guess applies the map through which it comes back once backward, and once more to learn. Heads
  that look ahead apply the next block's maps once, and once more for the exact signal or for every
  forward derivative.
  """
  blocks = [dict(stack.flop) for stack in model.stacks for _ in range(stack.count)]
  # The parts that are differentiated separately: every block, or the whole network.
  stages = (
    [list(block.items()) for block in blocks]
    if rule.cut
    else [[m for block in blocks for m in block.items()]]
  )
  behind = [sum(flop for _, flop in stage[n + 1 :]) for stage in stages for n in range(len(stage))]
  whole = sum(sum(block.values()) for block in blocks)
  first = sum(stage[0][1] for stage in stages)
  K, own = options.num_tangents, options.of(rule, model)
  through = _through(model, rule, own) if model.ahead else 0
  if rule.estimator == 'activity' and not own.joint:
    names = [name for stage in stages for name, _ in stage]
    derivatives = sum(
      (own.num_tangents_by_tap.get(name) or K) * flop
      for name, flop in zip(names, behind, strict=True)
    )
    following = [
      block[after]
      for block in blocks
      for tap, after in zip(block, list(block)[1:], strict=False)
      if tap in own.guessed_taps(model)
    ]
    return through + 2 * whole + derivatives + 2 * sum(following)
  return (
    through
    + {
      'backprop': 3 * whole - first,
      'activity': (2 + K) * whole - K * first,
      'weight': (1 + 2 * K) * whole - K * first,
      'direct_feedback': 2 * whole,
    }[rule.estimator]
  )


def _through(model: StagedModel, rule: Rule, options: Options) -> int:
  """Operations per example in the blocks that heads look through."""
  K, total = options.num_tangents, 0
  for stack, after in zip(model.stacks, next_stacks(model.stacks), strict=True):
    derivatives = K
    if rule.estimator == 'backprop' or options.last_tap == 'exact':
      derivatives = 1
    elif rule.estimator == 'activity' and not options.joint:
      derivatives = sum(options.num_tangents_by_tap.get(tap) or K for tap in stack.flop)
    total += stack.count * (1 + derivatives) * sum(after.flop.values() if after else ())
  return total

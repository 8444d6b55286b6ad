"""The operations that a rule's gradient needs, whatever program computes it."""

from lfg_jax.local.lookahead import next_stacks
from lfg_jax.local.staged import StagedModel
from lfg_jax.training.rules.rules import Options, Rule


def gradient_flop(model: StagedModel, rule: Rule, options: Options) -> int:
  """Operations per example that any program needs for a rule's gradient, not counting heads.

  F stands for all linear maps. F₁ stands for those whose input needs no derivative: the first map
  of the network or, if no gradient crosses blocks, the first map of every block.

  | estimator | value | derivatives | weights' gradients | sum |
  |---|---|---|---|---|
  | backprop | F | F - F₁ backward | F | 3 F - F₁ |
  | activity, K tangents, taps joint | F | K (F - F₁) forward | F | (2 + K) F - K F₁ |
  | activity, one by one | F | K × all behind each tap, forward; 2 × the maps of control variates | F | |
  | weight, K tangents | F | K (F - F₁) of inputs, K F of weights, forward | 0 | (1 + 2 K) F - K F₁ |
  | direct_feedback | F | 0 | F | 2 F |

  A control variate applies the map through which it comes back once backward, and once more to learn. Heads
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
  through = _through(model, rule, own) if model.lookahead else 0
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
      if tap in own.control_variate_taps(model)
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

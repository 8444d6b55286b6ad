"""Splits a network into the stages of the pipeline, and checks what can be split.

A pipeline stage consists of consecutive blockwise stages (blocks with local losses at their end). The
slowest stage sets the pace, so a cost model balances the stages.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from lfg_jax.local.blockwise import owned, stages
from lfg_jax.local.staged import StagedModel
from lfg_jax.training.rules.composition import Composition
from lfg_jax.training.rules.flop import gradient_flop
from lfg_jax.training.rules.rules import REGISTRY


def spans(composition: Composition, number: int) -> tuple[range, ...]:
  """The blockwise stages of each of `number` pipeline stages, with the slowest as fast as possible.

  >>> from lfg_jax.models import registry
  >>> from lfg_jax.training.rules import algorithms, rules
  >>> images = registry.Images((8, 8, 1), 10, (0.5,), (0.3,))
  >>> fields = {'blocks': 5, 'channels': 8, 'groups': 2}
  >>> model = registry.build(registry.find('mlp'), fields, images)
  >>> composition = algorithms.compose(rules.REGISTRY['LG-BP'], rules.Options(), model).composition
  >>> spans(composition, 2)
  (range(0, 1), range(1, 5))
  """
  ends = _balanced(tuple(costs(composition)), number)
  return tuple(range(*pair) for pair in zip((0, *ends), ends, strict=False))


def costs(composition: Composition) -> list[int]:
  """Operations per example of every blockwise stage.

  One is added, so that costs are positive even if a model does not count its operations.
  """
  model, every = composition.model, composition.options.every
  homes = [
    dataclasses.replace(stack, count=1) for stack in model.stacks for _ in range(stack.count)
  ]
  of = lambda blocks: dataclasses.replace(model, stacks=tuple(homes[n] for n in blocks))
  return [
    1 + gradient_flop(of(blocks), composition.rule, composition.options)
    for blocks, _ in stages(model.depth, every)
  ]


def _balanced(cost: Sequence[int], number: int) -> tuple[int, ...]:
  """Ends of `number` consecutive parts, none empty, that minimise the largest sum.

  >>> _balanced((4, 1, 1, 1, 1), 2)
  (1, 5)
  """

  before = list(itertools.accumulate(cost, initial=0))

  @functools.cache
  def best(end: int, parts: int) -> tuple[int, tuple[int, ...]]:
    if parts == 1:
      return before[end], (end,)
    options = []
    for last in range(parts - 1, end):
      slowest, ends = best(last, parts - 1)
      options.append((max(slowest, before[end] - before[last]), (*ends, end)))
    return min(options)

  return best(len(cost), number)[1]


def check_devices(config: Any, devices: int) -> None:
  """Checks that the devices, arranged in `config.pipeline_stages` stages, can divide the batch equally.

  Raises:
    ValueError: they cannot; one line with the reason.
  """
  number, batch_size = config.pipeline_stages, config.batch_size
  if devices % number:
    raise ValueError(
      f'pipeline_stages is {number}; allowed: divisors of {devices}, the number of devices'
    )
  if batch_size % (devices // number):
    of_stage = ' of a stage' if number > 1 else ''
    raise ValueError(
      f'batch_size is {batch_size}; allowed: multiples of {devices // number}, the number of '
      f'devices{of_stage}'
    )


def check(config: Any, composition: Composition) -> None:
  """Checks that a rule and a model can be split into `config.pipeline_stages` stages.

  Raises:
    ValueError: they cannot; one line with the reason.
  """
  number, rule = config.pipeline_stages, composition.rule
  if number == 1:
    return
  given = f'pipeline_stages is {number}, but '
  if not rule.cut:
    blockwise = ', '.join(name for name, other in REGISTRY.items() if other.cut)
    raise ValueError(
      f'{given}{config.algorithm} {_way_back(rule.local)}; allowed: 1, or one of {blockwise}'
    )
  for field in ('overlap', 'head_ahead'):
    if getattr(composition.options, field):
      raise ValueError(
        f'{given}losses.{field}=True lets every block learn from the next one; allowed: 1'
      )
  most = len(stages(composition.model.depth, composition.options.every))
  if number > most:
    raise ValueError(
      f'pipeline_stages is {number}; allowed: 1 … {most}, the number of parts of the network '
      'with losses of their own'
    )
  if config.optimizer.name == 'lars' and (
    name := _cut(composition.model, spans(composition, number), composition.options.every)
  ):
    raise ValueError(
      f"{given}optimizer.name='lars' takes one ratio for all blocks of {name!r}, which are "
      'not all in one stage; allowed: 1, or sgd, adam, adamw'
    )


def _way_back(local: bool) -> str:
  return (
    'sends a gradient from block to block'
    if local
    else 'learns from a loss at the end of the network, which all blocks must wait for'
  )


def _cut(model: StagedModel, parts: Sequence[range], every: int) -> str | None:
  """Name of a stack whose blocks are in more than one stage; None if there is none."""
  mine = [owned(model, part, every) for part in parts]
  return next(
    (stack.name for stack in model.stacks if sum(stack.name in names for names in mine) > 1), None
  )

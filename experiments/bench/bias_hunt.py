"""Hunts for biased gradients: random programs, each of which must be unbiased or refused.

    python experiments/bench/bias_hunt.py [--programs=100] [--seed=0] [--draws=10000] [--out=DIR]

A program is a network with two taps, with up to two random operations before, between and behind
them. The taps declare the losses of their own example, or of their own position, and are perturbed
jointly or one by one. `value_and_activity_grad` must refuse the program in a line, or its mean over
the draws must be the gradient, within 5.5 standard errors in every entry. (With 32 entries, one of
a million unbiased programs is farther off.) DIR gets bias_hunt.json, with one row per program.

Run it after a change to how influence is traced: a wrong rule for a primitive is a silent bias.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from bias_operations import APART, MIXING, B, C, T

from lfg_jax import tap, value_and_activity_grad
from lfg_jax.errors import UserError
from lfg_jax.estimators import variance
from lfg_jax.training import command_line, results

OPERATIONS = {**APART, **MIXING}
SIGMAS = 5.5
Row = dict[str, Any]


class Program(NamedTuple):
  """Names of the operations, and how the taps are declared and perturbed."""

  before: list[str]
  between: list[str]
  behind: list[str]
  local_axes: int
  separate: bool


def main(arguments: list[str]) -> None:
  """Tries all programs, prints those that are biased, and writes."""
  parser = results.parser(__doc__, out='runs/bias_hunt')
  parser.number('programs', 100, 'how many')
  parser.number('seed', 0, 'of the choice of operations', least=0)
  parser.number('draws', 10_000, 'estimates per program', least=100)
  options = parser.parse(arguments)
  folder = results.Folder(options.out, __file__, arguments)
  rng = random.Random(options.seed)
  with jax.enable_x64(True):
    rows = [judged(chosen(rng), options.draws) for _ in range(options.programs)]
  folder.write('bias_hunt', rows=rows)
  counts = Counter(row['verdict'] for row in rows)
  print(', '.join(f'{verdict}: {counts[verdict]}' for verdict in ('unbiased', 'refused', 'biased')))
  if counts['biased']:
    raise UserError(f'{counts["biased"]} of {len(rows)} programs are biased')


def chosen(rng: random.Random) -> Program:
  """A random program."""
  some = lambda: rng.choices([*OPERATIONS], k=rng.randint(0, 2))
  return Program(some(), some(), some(), rng.choice((1, 2)), rng.choice((True, False)))


def losses_of(program: Program) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
  """The program's losses, `(weights, x [B, T, C]) -> [B]` or [B, T]."""
  axes = program.local_axes

  def applied(names: list[str], x: jax.Array) -> jax.Array:
    for name in names:
      x = OPERATIONS[name](x)
    return x

  def losses(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = applied(program.before, x @ weights['first'])
    x = applied(program.between, tap(x, 'first', local_axes=axes))
    x = applied(program.behind, tap(x @ weights['second'], 'second', local_axes=axes))
    return (x**2).sum(tuple(range(axes, x.ndim)))

  return losses


def judged(program: Program, draws: int) -> Row:
  """Whether the program is refused, unbiased or biased; prints it if it is biased."""
  losses = losses_of(program)
  keys = jax.random.split(jax.random.key(0), 3)
  weights = {
    name: jax.random.normal(key, (C, C)) / 2
    for name, key in zip(('first', 'second'), keys[:2], strict=True)
  }
  x = jax.random.normal(keys[2], (B, T, C))
  exact = jax.jit(jax.grad(lambda weights: losses(weights, x).sum() / B))(weights)
  estimator = value_and_activity_grad(losses, separate=program.separate)
  try:
    found = variance.measure(
      lambda key: estimator(weights, x, key=key)[1], exact, jax.random.key(1), draws
    )
  except (ValueError, TypeError) as error:
    return {**program._asdict(), 'verdict': 'refused', 'reason': str(error), 'z': None}
  largest = max(float(z2.max()) for z2 in jax.tree.leaves(found.squared_z(exact))) ** 0.5
  verdict = 'biased' if largest > SIGMAS else 'unbiased'
  if verdict == 'biased':
    print(f'biased by {largest:.1f} standard errors: {program}', flush=True)
  return {**program._asdict(), 'verdict': verdict, 'reason': None, 'z': largest}


if __name__ == '__main__':
  command_line.run(main)

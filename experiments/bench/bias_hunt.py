"""Hunts for biased gradients: random programs, each of which must be unbiased or refused.

    python experiments/bench/bias_hunt.py [--programs=100] [--seed=0] [--draws=10000] [--out=DIR]

A program is a network with two taps, with up to two random operations before, between and behind
them: every primitive that has a rule, along every axis. The taps declare the losses of their own
example, or of their own position, or leave it to the equations. They are perturbed jointly or one
by one, in a scan or not, mapped over an ensemble or over data or not, with any kind of key.
`value_and_activity_grad` must refuse the program in a line, or its mean over the draws must be the
gradient, within 5.5 standard errors in every entry. (With 32 entries, one of a million unbiased
programs is farther off.) DIR gets bias_hunt.json, with one row per program, and meanwhile
bias_hunt.jsonl: a run that was stopped goes on from there.

Run it after a change to how influence is traced: a wrong rule for a primitive is a silent bias.
"""

import functools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import bias_primitives
import jax
import jax.numpy as jnp
from bias_operations import APART, MIXING, B, C, T

from lfg_jax import tap, value_and_activity_grad
from lfg_jax.errors import UserError
from lfg_jax.tangents import variance
from lfg_jax.training import command_line
from lfg_jax.training.run import results

OPERATIONS = {**APART, **MIXING, **bias_primitives.OPERATIONS}
SIGMAS = 5.5
KEYS = ('threefry2x32', 'rbg', 'unsafe_rbg')
Row = dict[str, Any]


class Program(NamedTuple):
  """Names of the operations, and how the taps are declared and perturbed.

  Attributes:
    before, between, behind: operations, by where they are.
    local_axes: of both taps; 'auto' leaves them to the equations.
    separate: whether the taps are perturbed one by one.
    place: 'plain'; 'scan', both taps and what is between and behind in a scan of two steps;
      'ensemble', the whole mapped over two networks, whose losses are added; 'data', the estimate
      mapped over two batches, with one key.
    generator: of the random numbers.
  """

  before: list[str]
  between: list[str]
  behind: list[str]
  local_axes: int | str
  separate: bool
  place: str
  generator: str


def main(arguments: list[str]) -> None:
  """Tries all programs, prints those that are biased, and writes."""
  parser = results.parser(__doc__, out='runs/bias_hunt')
  parser.number('programs', 100, 'how many')
  parser.number('seed', 0, 'of the choice of operations', least=0)
  parser.number('draws', 10_000, 'estimates per program', least=100)
  options = parser.parse(arguments)
  folder = results.Folder(options.out, __file__, arguments)
  rng = random.Random(options.seed)
  programs = [chosen(rng) for _ in range(options.programs)]
  path = Path(options.out) / 'bias_hunt.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  if [_program(row) for row in rows] != [json.loads(json.dumps(p)) for p in programs[: len(rows)]]:
    raise UserError(f'{path} has other programs; allowed: the same --seed and --programs')
  with jax.enable_x64(True), path.open('a') as file:
    for n, program in enumerate(programs[len(rows) :], len(rows)):
      rows.append(judged(program, options.draws))
      print(json.dumps(rows[-1]), file=file, flush=True)
      if n % 20 == 19:
        jax.clear_caches()  # every program is another one
  folder.write('bias_hunt', rows=rows)
  counts = Counter(row['verdict'] for row in rows)
  print(', '.join(f'{verdict}: {counts[verdict]}' for verdict in ('unbiased', 'refused', 'biased')))
  if counts['biased']:
    raise UserError(f'{counts["biased"]} of {len(rows)} programs are biased')


def _program(row: Row) -> list:
  return [row[field] for field in Program._fields]


def chosen(rng: random.Random) -> Program:
  """A random program."""
  some = lambda: rng.choices([*OPERATIONS], k=rng.randint(0, 2))
  places = ('plain', 'scan', 'ensemble', 'data')
  return Program(
    some(),
    some(),
    some(),
    rng.choice((1, 2, 'auto')),
    rng.choice((True, False)),
    rng.choice(places),
    rng.choice(KEYS),
  )


def losses_of(program: Program) -> Callable[[dict[str, jax.Array], jax.Array], jax.Array]:
  """The program's losses, `(weights, x [B, T, C]) -> [B]` or [B, T]."""
  axes = program.local_axes

  def applied(names: list[str], x: jax.Array) -> jax.Array:
    for name in names:
      x = OPERATIONS[name](x)
    return x

  def taps(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = applied(program.between, tap(x @ weights['first'], 'first', local_axes=axes))
    return applied(program.behind, tap(x @ weights['second'], 'second', local_axes=axes))

  def network(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = applied(program.before, x @ weights['first'])
    if program.place == 'scan':  # what is behind the taps is before them in the second step
      return jax.lax.scan(lambda x, _: (jnp.tanh(taps(weights, x)), None), x, None, length=2)[0]
    return taps(weights, x)

  def losses(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    if program.place == 'ensemble':
      several = jax.tree.map(lambda w: jnp.stack([w, -w]), weights)
      x = jax.vmap(network, (0, None))(several, x).sum(0)
    else:
      x = network(weights, x)
    return (x**2).sum(tuple(range(1 if axes == 1 else 2, x.ndim)))

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
  batches = jnp.stack([x, jnp.sin(x)]) if program.place == 'data' else x[None]
  exact = jax.jit(jax.grad(lambda weights: sum(losses(weights, x).sum() for x in batches) / B))(
    weights
  )
  estimator = value_and_activity_grad(losses, joint=not program.separate)

  def estimate(key: jax.Array) -> dict[str, jax.Array]:
    each = jax.vmap(lambda x: estimator(weights, x, key=key)[1])(batches)
    return jax.tree.map(lambda g: g.sum(0), each)

  one = functools.partial(estimator, weights, x, key=keys[0])
  try:
    found = variance.measure(
      estimate if program.place == 'data' else lambda key: one(key=key)[1],
      exact,
      jax.random.key(1, impl=program.generator),
      draws,
    )
  except (ValueError, TypeError) as error:
    return {**program._asdict(), 'verdict': 'refused', 'reason': str(error), 'z': None}
  largest = max(float(z2.max()) for z2 in jax.tree.leaves(found.squared_z(exact))) ** 0.5
  verdict = 'unbiased' if largest <= SIGMAS else 'biased'  # not a number is biased
  if verdict == 'biased':
    print(f'biased by {largest:.1f} standard errors: {program}', flush=True)
  return {**program._asdict(), 'verdict': verdict, 'reason': None, 'z': largest}


if __name__ == '__main__':
  command_line.run(main)

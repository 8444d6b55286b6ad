"""Odd values in all fields: each is accepted, or refused with one line."""

import random

from lfg_jax.errors import UserError
from lfg_jax.training import command_line, configs, train
from tests.runs import tiny

COUNT = 300  # of each kind
ODD = [
  '0',
  '1',
  '-1',
  '3',
  '7',
  '-2147483648',
  '2147483647',
  '99999999999999999999',
  '1e30',
  '-1e-30',
  '0.5',
  'nan',
  'inf',
  'None',
  'none',
  '',
  ' ',
  'text',
  'True',
  'False',
  '1,2',
  '(1,',
  '[]',
  "('a',)",
  'head,readout',
  'head,,x',
  '(1,(2,3))',
  '{}',
  'S/1/1',
  'S/0/1',
  'M/8/16',
  'L/9999999999/1',
  'ß',
  '١',
  '\x00',
  '/dev/null',
  'a=b',
  '--config',
  'BP',
  'FG-W',
  'DFA',
  'conv',
  'batch',
  'bfloat16',
  'contrastive',
  'mnist',
  'projection',
  'independent',
  'separate',
  'exact',
  'all',
  'lars',
  'cosine',
]
OBJECTS = [
  None,
  0,
  -1,
  10**30,
  0.5,
  float('nan'),
  float('inf'),
  '',
  'x',
  True,
  (),
  (1,),
  ('head', 3),
  [1],
  {'a': 1},
  b'x',
]


# `distributed` would look for a cluster.
FIELDS = [name for name, _ in configs.flatten(configs.base()) if name != 'distributed']


def outcome(make):
  """'good', or the message of a UserError; raises all other errors."""
  try:
    train.prepare(make())
  except UserError as error:
    return str(error)
  return 'good'


def test_command_lines():
  """Sets one to three fields at a time, which may contradict each other."""
  rng = random.Random(0)
  outcomes = []
  for _ in range(COUNT):
    arguments = [
      f'--config.{rng.choice(FIELDS)}={rng.choice(ODD)}' for _ in range(rng.choice([1, 1, 2, 3]))
    ]
    outcomes.append(outcome(lambda arguments=arguments: command_line.override(tiny(), arguments)))
    assert outcomes[-1].strip() and '\n' not in outcomes[-1], arguments
  assert len(set(outcomes)) > COUNT / 2 and 'good' in outcomes


def test_config_files():
  """Sets values of any type, as a file can."""
  rng = random.Random(1)
  for _ in range(COUNT):
    field, value = rng.choice(FIELDS), rng.choice(OBJECTS)

    def make(field=field, value=value):
      node = whole = tiny()
      *parents, last = field.split('.')
      for parent in parents:
        node = node[parent]
      del node[last]
      node[last] = value
      return whole

    line = outcome(make)
    assert line.strip() and '\n' not in line, (field, value)

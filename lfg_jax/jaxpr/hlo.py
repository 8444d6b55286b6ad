"""What a compiled program computes and sends, counted in XLA's text, which is for one device.

The body of a loop counts once per round if the text states the number of rounds, and otherwise
once, as for the steps of a dispatch. A conditional has the largest counts of its branches, because
a stage of a pipeline takes only one of them.
"""

import collections
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

BITS = {
  'pred': 8,
  's4': 4,
  'u4': 4,
  's8': 8,
  'u8': 8,
  's16': 16,
  'u16': 16,
  'f16': 16,
  'bf16': 16,
  's32': 32,
  'u32': 32,
  'f32': 32,
  's64': 64,
  'u64': 64,
  'f64': 64,
}
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_INSTRUCTION = re.compile(
  r'^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)\('
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body)=%([\w.\-]+)')
_BRANCHES = re.compile(
  r'branch_computations=\{([^}]*)\}|true_computation=(%[\w.\-]+), '
  r'false_computation=(%[\w.\-]+)'
)
_ROUNDS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
  """One instruction: `shape` is its result's, `operands` are names, `line` is the whole line."""

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  line: str


class Sent(NamedTuple):
  """What all collectives of one kind send.

  Attributes:
    operations: number of operations.
    payload: bytes of their operands.
    sent: bytes that a device sends for them, if they run in a ring.
  """

  operations: int
  payload: int
  sent: int


Counts = collections.Counter[str]


def computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """Returns the instructions (by name) of every computation, and the name of the entry."""
  found: dict[str, dict[str, Instruction]] = {}
  name = entry = ''
  for line in text.splitlines():
    if header := re.match(r'(ENTRY )?%([\w.\-]+) \(.*\{$', line):
      name = header[2]
      entry = name if header[1] else entry
      found[name] = {}
    elif match := _INSTRUCTION.match(line):
      operands = tuple(re.findall(r'%([\w.\-]+)', line[match.end() :].partition(')')[0]))
      found[name][match['name']] = Instruction(
        match['name'], match['shape'], match['op'], operands, line
      )
  return found, entry


def sizes(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Yields (dtype, dimensions) for every array in a shape.

  >>> list(sizes('(f32[2,3]{1,0}, s32[])'))
  [('f32', (2, 3)), ('s32', ())]
  """
  for kind, dims in _ARRAY.findall(shape):
    yield kind, tuple(int(d) for d in dims.split(',') if d)


def size_bytes(shape: str) -> int:
  """Total bytes of all arrays in a shape.

  >>> size_bytes('(f32[2,3]{1,0}, s32[])')
  28
  """
  return sum(math.prod(dims) * BITS[kind] // 8 for kind, dims in sizes(shape) if kind in BITS)


def collectives(text: str) -> dict[str, Sent]:
  """Returns what a device sends, by kind of collective. Groups of one device send nothing."""
  counts = _count(text, _sent)
  return {
    kind: Sent(*(counts[f'{kind} {what}'] for what in Sent._fields))
    for kind in COLLECTIVES
    if counts.get(f'{kind} operations')
  }


def flop(text: str) -> int:
  """Number of floating-point operations in matrix products and convolutions only."""
  return _count(text, _products).get('flop', 0)


def _count(
  text: str, of: Callable[[Instruction, Mapping[str, Instruction]], dict[str, int]]
) -> Counts:
  """Sums `of(instruction, instructions of its computation)` over all instructions."""
  found, entry = computations(text)
  known: dict[str, Counts] = {}

  def total(name: str) -> Counts:
    if name not in known:
      known[name] = collections.Counter()
      for instruction in found[name].values():
        known[name] += collections.Counter(of(instruction, found[name]))
        known[name] += inside(instruction)
    return known[name]

  def inside(instruction: Instruction) -> Counts:
    line = instruction.line
    if instruction.op == 'conditional' and (match := _BRANCHES.search(line)):
      branches = [total(name) for name in re.findall(r'%([\w.\-]+)', match[0])]
      return functools.reduce(operator.or_, branches)  # of counters: the elementwise maximum
    if instruction.op not in ('fusion', 'call', 'while', 'async-start'):
      return collections.Counter()
    rounds = _ROUNDS.search(line) if instruction.op == 'while' else None
    return collections.Counter(
      {
        what: count * (int(rounds[1]) if rounds else 1)
        for name in _CALLED.findall(line)
        for what, count in total(name).items()
      }
    )

  return total(entry)


def _sent(instruction: Instruction, near: Mapping[str, Instruction]) -> dict[str, int]:
  kind = instruction.op.removesuffix('-start')
  if kind not in COLLECTIVES:
    return {}
  payload = sent = sum(size_bytes(near[name].shape) for name in instruction.operands)
  if kind != 'collective-permute':
    group = _group(instruction.line)
    if group == 1:
      return {}
    times = {'all-reduce': 2, 'all-gather': group}.get(kind, 1)
    sent = times * (group - 1) * payload // group
  return {f'{kind} operations': 1, f'{kind} payload': payload, f'{kind} sent': sent}


def _group(line: str) -> int:
  """Number of devices in each group of a collective.

  >>> _group('replica_groups={{0,2},{1,3}}'), _group('replica_groups=[2,4]<=[8]')
  (2, 4)
  >>> _group("replica_groups=mesh['data'=4,'stage'=2] {'data'}")    # as jax 0.11 writes it
  4
  """
  if match := re.search(r'replica_groups=\[(\d+),(\d+)\]', line):
    return int(match[2])
  if match := re.search(r'replica_groups=\{\{([\d,]*)\}', line):
    return len(match[1].split(','))
  if match := re.search(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}', line):
    axes = dict(axis.split('=') for axis in match[1].split(','))
    return math.prod(int(axes[name.strip()]) for name in match[2].split(','))
  raise ValueError(f'no groups of devices in {line}')


def _products(instruction: Instruction, near: Mapping[str, Instruction]) -> dict[str, int]:
  if instruction.op not in ('dot', 'convolution'):
    return {}
  shapes = [
    next(sizes(shape))[1]
    for shape in (instruction.shape, *(near[name].shape for name in instruction.operands))
  ]
  if instruction.op == 'dot':
    match = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.line)
    inner = math.prod(shapes[1][int(d)] for d in match[1].split(',') if d) if match else 1
  else:  # every output sums over the kernel's axes except that of outputs, 'o' in dim_labels
    labels = re.search(r'dim_labels=\w+_(\w+)->', instruction.line)
    inner = math.prod(shapes[2]) // shapes[2][labels[1].index('o')] if labels else 1
  return {'flop': 2 * math.prod(shapes[0]) * inner}

"""What each primitive does to the labels of `mixing`: where the axis of the examples goes.

`moved` gives the label of what a primitive returns, from those of its inputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Mixed(NamedTuple):
  """Entries of several examples may have been combined, by a primitive that is known or not."""

  primitive: str
  is_known: bool


Label = int | Mixed | None

# fmt: off
_ELEMENTWISE = frozenset((
    'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan', 'atan2', 'atanh',
    'bessel_i0e', 'bessel_i1e', 'cbrt', 'ceil', 'clamp', 'complex', 'conj',
    'convert_element_type', 'copy', 'copy_p', 'cos', 'cosh', 'digamma', 'div', 'erf', 'erf_inv',
    'erfc', 'exp', 'exp2', 'expm1', 'floor', 'igamma', 'igammac', 'imag', 'integer_pow',
    'is_finite', 'layout_constraint', 'lgamma', 'log', 'log1p', 'logistic', 'max', 'min', 'mul',
    'name', 'neg', 'nextafter', 'not', 'or', 'pcast', 'polygamma', 'pow', 'pvary', 'real',
    'reduce_precision', 'regularized_incomplete_beta', 'rem', 'reshard', 'round', 'rsqrt',
    'select_n', 'sharding_constraint', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'sub', 'tan',
    'tanh', 'tap', 'xor'))
_ALONG_ONE_AXIS = {'cumsum': 'axis', 'cumprod': 'axis', 'cummax': 'axis', 'cummin': 'axis',
                   'cumlogsumexp': 'axis', 'split': 'axis', 'sort': 'dimension',
                   'concatenate': 'dimension'}
_COLLECTIVES = ('psum', 'pmax', 'pmin', 'all_gather', 'all_to_all', 'ppermute', 'pbroadcast',
                'reduce_scatter')
_MATRICES = ('cholesky', 'triangular_solve', 'lu', 'eigh', 'qr', 'svd', 'householder_product')
# fmt: on


def moved(eqn: Any, ins: list, size: int) -> Label:
  """The label of the outputs of a primitive, none of whose inputs is mixed.

  Args:
    size: of the axis that is followed, in the taps.
  """
  name, shapes = eqn.primitive.name, [v.aval.shape for v in eqn.invars]
  if name == 'reshape':
    return _reshape(shapes[0], eqn.outvars[0].aval.shape, ins[0], size)
  if name.startswith(_COLLECTIVES):
    return Mixed(name, True)
  if name in _ELEMENTWISE:
    return join(name, ins)
  if name in _ALONG_ONE_AXIS:
    axis = eqn.params[_ALONG_ONE_AXIS[name]]
    return Mixed(name, True) if axis in ins else join(name, ins)
  if name in _MATRICES:
    core = 1 if name == 'householder_product' else 2
    behind = any(
      label is not None and label >= len(shape) - core
      for label, shape in zip(ins, shapes, strict=True)
    )
    return Mixed(name, True) if behind else join(name, ins)
  rule = _RULES.get('reduce_window' if name.startswith('reduce_window') else name)
  return rule(eqn.params, shapes, ins, name) if rule else Mixed(name, False)


def join(name: str, labels: Sequence[Label]) -> Label:
  """The label of values combined entry by entry."""
  mixed = [label for label in labels if isinstance(label, Mixed)]
  found = {label for label in labels if label is not None}
  if mixed:
    return mixed[0]
  return Mixed(name, True) if len(found) > 1 else next(iter(found), None)


def _reshape(before: tuple, after: tuple, label: Label, size: int) -> Label:
  """Examples stay together if the product of the leading axes is unchanged.

  The axis after those must hold all examples.
  """
  assert isinstance(label, int)
  front = math.prod(before[:label])
  for axis, length in enumerate(after):
    if math.prod(after[:axis]) == front and length % size == 0 and length:
      return axis
  return Mixed('reshape', False)


# Primitives that move axes: `(params, shapes, labels, name) -> label`, with a labelled operand.
def _dot_general(params: dict, shapes: list, ins: list, name: str) -> Label:
  contracted, batch = params['dimension_numbers']
  outs: list[Label] = []
  free = [
    [a for a in range(len(shape)) if a not in (*c, *b)]
    for shape, c, b in zip(shapes, contracted, batch, strict=True)
  ]
  for side, label in enumerate(ins):
    if label is None:
      continue
    if label in contracted[side]:
      return Mixed(name, True)
    if label in batch[side]:
      outs.append(list(batch[side]).index(label))
    else:
      outs.append(len(batch[side]) + side * len(free[0]) + free[side].index(label))
  return join(name, outs)


def _conv(params: dict, shapes: list, ins: list, name: str) -> Label:
  numbers = params['dimension_numbers']
  if ins[1] is None and params['batch_group_count'] == 1:
    is_batch = ins[0] == numbers.lhs_spec[0]
    return numbers.out_spec[0] if is_batch else Mixed(name, ins[0] in numbers.lhs_spec[2:])
  return Mixed(name, False)


def _gather(params: dict, shapes: list, ins: list, name: str) -> Label:
  numbers, shape, label = params['dimension_numbers'], shapes[0], ins[0]
  dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  outs = len(shapes[1]) - 1 + len(shape) - len(dropped)
  if label in numbers.operand_batching_dims:
    place = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(label)]
    return [a for a in range(outs) if a not in numbers.offset_dims][place]
  if label in dropped or params['slice_sizes'][label] != shape[label]:
    return Mixed(name, True)
  return numbers.offset_dims[[a for a in range(len(shape)) if a not in dropped].index(label)]


def _scatter(params: dict, shapes: list, ins: list, name: str) -> Label:
  numbers, (shape, _, updates), label = params['dimension_numbers'], shapes, ins[2]
  if label is None:
    return ins[0]
  other = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
  window = [a for a in range(len(shape)) if a not in other]
  if label not in numbers.update_window_dims:
    return Mixed(name, False)
  axis = window[numbers.update_window_dims.index(label)]
  return join(name, [ins[0], axis]) if updates[label] == shape[axis] else Mixed(name, True)


def _kept(is_whole: Callable[[dict, list, int], bool]) -> Callable:
  """Primitives that leave an axis in place and, if `is_whole`, keep its entries separate."""

  def rule(params: dict, shapes: list, ins: list, name: str) -> Label:
    whole = all(is_whole(params, shapes, label) for label in ins if label is not None)
    return join(name, ins) if whole else Mixed(name, True)

  return rule


def _removed(axes: str) -> Callable:
  """Primitives that remove axes."""

  def rule(params: dict, shapes: list, ins: list, name: str) -> Label:
    gone = params[axes] if isinstance(params[axes], tuple) else (params[axes],)
    label = join(name, ins)
    if not isinstance(label, int):
      return label
    return Mixed(name, True) if label in gone else label - sum(a < label for a in gone)

  return rule


def _shifted(label: Label, axis: int) -> Label:
  return label + (axis <= label) if isinstance(label, int) else label


def _is_whole_slice(params: dict, shapes: list, a: int) -> bool:
  strides = params['strides'] or (1,) * len(shapes[0])
  taken = (params['start_indices'][a], params['limit_indices'][a], strides[a])
  return taken == (0, shapes[0][a], 1)


# fmt: off
_RULES: dict[str, Callable[[dict, list, list, str], Label]] = {
    'dot_general': _dot_general, 'conv_general_dilated': _conv, 'gather': _gather,
    'scatter': _scatter, 'scatter-add': _scatter, 'scatter_add': _scatter, 'scatter_mul': _scatter,
    'reduce_sum': _removed('axes'), 'reduce_prod': _removed('axes'),
    'reduce_max': _removed('axes'), 'reduce_min': _removed('axes'),
    'squeeze': _removed('dimensions'), 'unstack': _removed('axis'),
    'broadcast_in_dim': lambda params, shapes, ins, name: params['broadcast_dimensions'][ins[0]],
    'transpose': lambda params, shapes, ins, name: tuple(params['permutation']).index(ins[0]),
    'stack': lambda params, shapes, ins, name: _shifted(join(name, ins), params['axis']),
    'tile': _kept(lambda params, shapes, a: params['reps'][a] == 1),
    'reduce_window': _kept(lambda params, shapes, a: params['window_dimensions'][a] == 1),
    'rev': _kept(lambda params, shapes, a: a not in params['dimensions']),
    'pad': _kept(lambda params, shapes, a: tuple(params['padding_config'][a]) == (0, 0, 0)),
    'slice': _kept(_is_whole_slice),
    'dynamic_slice': _kept(lambda params, shapes, a: params['slice_sizes'][a] == shapes[0][a]),
    'dynamic_update_slice': _kept(lambda params, shapes, a: shapes[0][a] == shapes[1][a]),
    'top_k': _kept(lambda params, shapes, a: a != len(shapes[0]) - 1),
    'fft': _kept(lambda params, shapes, a: a < len(shapes[0]) - len(params['fft_lengths']))}
# fmt: on

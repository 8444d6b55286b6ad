"""What each primitive does to the labels of `dependence`: where the axes of the examples go.

`moved` gives the label of what a primitive returns, from those of its inputs. A rule is listed with
all parameters of its primitive that it understands. An equation with another one is not read: a
new release of JAX may have given it a meaning.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Mixed(NamedTuple):
  """Entries of several examples may have been combined, by what is known to do so or not."""

  cause: str
  is_known: bool


class Digit(NamedTuple):
  """Entry i of `axis` belongs to examples whose number has the digit (i // inner) % size.

  Attributes:
    axis: of the value. Inside a scan, -1 is the scanned axis, -2 that of the scan around it, ….
    size: how many values the digit has.
    inner: how many consecutive entries share it.
    weight: of the digit in the number of the example.
  """

  axis: int
  size: int
  inner: int = 1
  weight: int = 1


# Digits by weight, together the number of the example; None: no dependence on the taps.
Label = tuple[Digit, ...] | Mixed | None


class Operation(NamedTuple):
  """A primitive's parameters, and the shapes of its inputs and outputs."""

  params: dict
  ins: list[tuple[int, ...]]
  outs: list[tuple[int, ...]]


class _NotApartError(Exception):
  """A rule finds that entries of several examples are combined, or may be (not `is_known`)."""

  is_known = True


class _UnreadError(_NotApartError):
  is_known = False


# `(operation, axis of each input or None) -> axis of the outputs`, for some axis.
Rule = Callable[..., Any]


def moved(eqn: Any, ins: Sequence[Label]) -> Label:
  """The label of the outputs of a primitive, some of whose inputs have one."""
  name, labels = eqn.primitive.name, [label for label in ins if label is not None]
  mixed = join(name, labels)
  if isinstance(mixed, Mixed) and mixed in labels:
    return mixed
  if name.startswith(_COLLECTIVES):
    return Mixed(name, True)
  unknown = unread(eqn)
  rule = None if unknown else _RULES[name][0]
  if rule is None:
    return Mixed(unknown or name, False)
  shapes = [[v.aval.shape for v in side] for side in (eqn.invars, eqn.outvars)]
  try:
    return _applied(rule, Operation(eqn.params, *shapes), ins)
  except _NotApartError as error:
    return Mixed(name, error.is_known)


def unread(eqn: Any) -> str | None:
  """The primitive, or its parameter, that the rules do not know."""
  name, numbers = eqn.primitive.name, eqn.params.get('dimension_numbers')
  if name not in _RULES:
    return name
  unknown = [p for p in eqn.params if p not in _RULES[name][1]]
  unknown += [field for field in getattr(numbers, '_fields', ()) if field not in _NUMBERS]
  return f'{name}: parameter {unknown[0]!r}' if unknown else None


def join(name: str, labels: Sequence[Label]) -> Label:
  """The label of values combined entry by entry."""
  found = list(dict.fromkeys(label for label in labels if label is not None))
  mixed = [label for label in found if isinstance(label, Mixed)]
  if mixed:
    return max(mixed, key=lambda label: label.is_known)  # what is known to mix settles it
  return Mixed(name, True) if len(found) > 1 else next(iter(found), None)


def _applied(rule: Rule, op: Operation, ins: Sequence[Any]) -> Label:
  labels = [label for label in ins if label is not None]
  if rule is _reshape:
    return _reshape(op, labels[0])
  _check(len({tuple(d._replace(axis=0) for d in label) for label in labels}) == 1)
  out = []
  for digits in zip(*(label or (None,) * len(labels[0]) for label in ins), strict=True):
    axes = [digit and digit.axis for digit in digits]
    place = next(n for n, axis in enumerate(axes) if axis is not None)
    if min(axis for axis in axes if axis is not None) < 0:
      axis = _same(op, axes)  # all of the value belongs to one step of a scan
    else:
      axis, length = rule(op, axes), op.ins[place][axes[place]]
      # A rule that forgets a case shows here: the axis has the same entries as before.
      _check(all(shape[axis : axis + 1] == (length,) for shape in op.outs), _UnreadError)
    out.append(digits[place]._replace(axis=axis))
  return tuple(out)


def _check(is_apart: bool, error: type[_NotApartError] = _NotApartError) -> None:
  if not is_apart:
    raise error


def _reshape(op: Operation, label: tuple[Digit, ...]) -> Label:
  """In row-major order, a digit covers entries from its stride up to size · stride."""
  (before,), (after,) = op.ins, op.outs
  _check(op.params['dimensions'] is None, _UnreadError)
  out: list[Digit] = [d for d in label if d.axis < 0]
  for digit in (d for d in label if d.axis >= 0):
    start = place = digit.inner * math.prod(before[digit.axis + 1 :])
    end = start * digit.size
    for axis in reversed(range(len(after))):
      stride = math.prod(after[axis + 1 :])
      upper = min(end, stride * after[axis])
      if stride <= place < upper:
        is_whole = not (place % stride or upper % place or stride * after[axis] % upper)
        _check(is_whole and end % upper == 0, _UnreadError)
        weight = digit.weight * (place // start)
        out.append(Digit(axis, upper // place, place // stride, weight))
        place = upper
    _check(place == end, _UnreadError)
  return _merged(sorted(out, key=lambda d: d.weight))


def _merged(digits: list[Digit]) -> tuple[Digit, ...]:
  """Neighbouring digits of one axis are one."""
  out = digits[:1]
  for d in digits[1:]:
    last = out[-1]
    if (d.axis, d.inner, d.weight) == (last.axis, last.size * last.inner, last.size * last.weight):
      out[-1] = last._replace(size=last.size * d.size)
    else:
      out.append(d)
  return tuple(out)


def _same(op: Operation, axes: list) -> int:
  """The axis that all inputs share."""
  found = {axis for axis in axes if axis is not None}
  _check(len(found) == 1)
  return found.pop()


def _kept(is_whole: Callable[[dict, tuple, int], bool]) -> Rule:
  """Primitives that leave an axis in place and, if `is_whole`, keep its entries separate."""

  def rule(op: Operation, axes: list) -> int:
    axis = _same(op, axes)
    _check(is_whole(op.params, op.ins[0], axis))
    return axis

  return rule


def _apart_from(name: str) -> Rule:
  """Primitives that work along one axis."""
  return _kept(lambda params, shape, a: a != params[name] % len(shape))


def _removed(name: str) -> Rule:
  """Primitives that remove axes."""

  def rule(op: Operation, axes: list) -> int:
    gone, axis = op.params[name], _same(op, axes)
    gone = gone if isinstance(gone, tuple) else (gone,)
    _check(axis not in gone)
    return axis - sum(a < axis for a in gone)

  return rule


def _stack(op: Operation, axes: list) -> int:
  axis = _same(op, axes)
  return axis + (op.params['axis'] <= axis)


def _batched(op: Operation, axes: list) -> int:
  """Matrices on the last two axes; vectors, where they come with matrices, on the last one."""
  _check(_same(op, axes) < max(map(len, op.ins)) - 2)
  return _same(op, axes)


def _solved(op: Operation, axes: list) -> int:
  """Right-hand sides in the columns of b (rows, unless `left_side`) are solved one by one."""
  columns = len(op.ins[-1]) - (1 if op.params.get('left_side', True) else 2)
  return columns if axes == [*[None] * (len(axes) - 1), columns] else _batched(op, axes)


def _dot_general(op: Operation, axes: list) -> int:
  return _product(op, axes, *op.params['dimension_numbers'])


def _ragged_dot(op: Operation, axes: list) -> int:
  """Every row has a matrix of its own, if the rows (and not what is summed over) are in groups."""
  numbers = op.params['ragged_dot_dimension_numbers']
  contracted, batch = numbers.dot_dimension_numbers
  is_by_row = not set(numbers.lhs_ragged_dimensions) & {*contracted[0], *batch[0]}
  _check(axes[1] is None and is_by_row, _UnreadError)
  return _product(op, axes, contracted, batch)


def _product(op: Operation, axes: list, contracted: Any, batch: Any) -> int:
  outs, before = [], len(batch[0])
  for shape, c, b, axis in zip(op.ins, contracted, batch, axes, strict=False):
    free = [a for a in range(len(shape)) if a not in (*c, *b)]
    _check(axis not in c)
    if axis is not None:
      outs.append(list(b).index(axis) if axis in b else before + free.index(axis))
    before += len(free)
  return _same(op, outs)


def _conv(op: Operation, axes: list) -> int:
  numbers = op.params['dimension_numbers']
  _check(axes[1] is None and op.params['batch_group_count'] == 1, _UnreadError)
  _check(axes[0] not in numbers.lhs_spec[2:])
  _check(axes[0] == numbers.lhs_spec[0], _UnreadError)
  return numbers.out_spec[0]


def _gather(op: Operation, axes: list) -> int:
  numbers, shape, axis = op.params['dimension_numbers'], op.ins[0], axes[0]
  dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  if axis in numbers.operand_batching_dims:
    place = numbers.start_indices_batching_dims[numbers.operand_batching_dims.index(axis)]
    return [a for a in range(len(op.outs[0])) if a not in numbers.offset_dims][place]
  _check(axis not in dropped and op.params['slice_sizes'][axis] == shape[axis])
  return numbers.offset_dims[[a for a in range(len(shape)) if a not in dropped].index(axis)]


def _scatter(op: Operation, axes: list) -> int:
  """Updates go to where indices say: they mix, unless whole in a window or along a batch axis."""
  numbers, (shape, _, updates), axis = op.params['dimension_numbers'], op.ins, axes[2]
  if axis is None:
    return axes[0]
  batching = numbers.operand_batching_dims
  window = [a for a in range(len(shape)) if a not in (*numbers.inserted_window_dims, *batching)]
  if axis in numbers.update_window_dims:
    to = window[numbers.update_window_dims.index(axis)]
  else:
    place = [a for a in range(len(updates)) if a not in numbers.update_window_dims].index(axis)
    _check(place in numbers.scatter_indices_batching_dims)
    to = batching[numbers.scatter_indices_batching_dims.index(place)]
  _check(updates[axis] == shape[to])
  return _same(op, [axes[0], to])


def _dynamic_update_slice(op: Operation, axes: list) -> int:
  axis = _same(op, axes)
  _check(axes[1] is None or op.ins[0][axis] == op.ins[1][axis])
  return axis


def _is_whole_slice(params: dict, shape: tuple, a: int) -> bool:
  strides = params['strides'] or (1,) * len(shape)
  return (params['start_indices'][a], params['limit_indices'][a], strides[a]) == (0, shape[a], 1)


def _is_apart_in_windows(params: dict, shape: tuple, a: int) -> bool:
  given = [params[name][a] for name in ('window_dimensions', 'window_strides', 'base_dilation')]
  return given == [1, 1, 1] and tuple(params['padding'][a]) == (0, 0)


# fmt: off
_COLLECTIVES = ('psum', 'pmax', 'pmin', 'all_gather', 'all_to_all', 'ppermute', 'pbroadcast',
                'reduce_scatter')
_NUMBERS = ('offset_dims', 'collapsed_slice_dims', 'start_index_map', 'operand_batching_dims',
            'start_indices_batching_dims', 'update_window_dims', 'inserted_window_dims',
            'scatter_dims_to_operand_dims', 'scatter_indices_batching_dims', 'lhs_spec', 'rhs_spec',
            'out_spec')
_WINDOWS = 'window_dimensions window_strides padding base_dilation window_dilation'
# Rule (None: `dependence` itself enters the primitive), primitives, their parameters.
_TABLE: list[tuple[Rule | None, str, str]] = [
    (_same, '''abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e ceil
        clamp complex copy copy_p cosh digamma div floor igamma igamma_grad_a
        igammac imag is_finite lgamma max min mulhi neg nextafter not one_minus_square or polygamma
        pow random_gamma_grad real regularized_incomplete_beta rem select_n sign sinh square sub
        xor zeta''', ''),
    (_same, 'cbrt cos erf erf_inv erfc exp exp2 expm1 log log1p log2 logistic rsqrt sin sqrt tan tanh',
        'accuracy'),
    (_same, 'mul', 'out_dtype'), (_same, 'integer_pow', 'y'), (_same, 'round', 'rounding_method'),
    (_same, 'conj', 'input_dtype'), (_same, 'name', 'name'), (_same, 'pvary', 'axes'),
    (_same, 'convert_element_type', 'new_dtype sharding weak_type'),
    (_same, 'reduce_precision', 'exponent_bits mantissa_bits'), (_same, 'pcast', 'axes to'),
    (_same, 'layout_constraint', 'layout'), (_same, 'reshard', 'dst_sharding concrete_mesh'),
    (_same, 'sharding_constraint', 'sharding layout context_mesh unconstrained_dims'),
    (_apart_from('axis'), 'cumsum cumprod cummax cummin cumlogsumexp', 'axis reverse'),
    (_apart_from('axis'), 'split', 'axis sizes'), (_apart_from('dimension'), 'concatenate', 'dimension'),
    (_apart_from('dimension'), 'sort', 'dimension is_stable num_keys'),
    (_apart_from('axis'), 'top_k', 'axis k is_stable'),
    (_apart_from('reduction_dimension'), 'approx_top_k', '''aggregate_to_topk is_max_k k
        recall_target reduction_dimension reduction_input_size_override'''),
    (_removed('axes'), 'reduce_sum reduce_prod reduce_max reduce_min', 'axes out_sharding'),
    (_removed('dimensions'), 'squeeze', 'dimensions'), (_removed('axis'), 'unstack', 'axis'),
    (_stack, 'stack', 'axis'),
    (_batched, 'cholesky lu householder_product', ''),
    (_batched, 'eigh', 'algorithm lower sort_eigenvalues subset_by_index'),
    (_batched, 'qr', 'full_matrices pivoting use_magma'),
    (_batched, 'svd', 'algorithm compute_uv full_matrices subset_by_index'),
    (_solved, 'tridiagonal_solve', 'perturb_singular'),
    (_solved, 'triangular_solve', 'conjugate_a left_side lower transpose_a unit_diagonal'),
    (_dot_general, 'dot_general', 'dimension_numbers precision preferred_element_type out_sharding'),
    (_ragged_dot, 'ragged_dot_general', '''ragged_dot_dimension_numbers group_offset precision
        preferred_element_type out_sharding'''),
    (_conv, 'conv_general_dilated', '''batch_group_count dimension_numbers feature_group_count
        lhs_dilation out_sharding padding precision preferred_element_type rhs_dilation
        window_strides'''),
    (_gather, 'gather', 'dimension_numbers fill_value indices_are_sorted mode slice_sizes unique_indices'),
    (_scatter, 'scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max',
        'dimension_numbers indices_are_sorted mode unique_indices update_consts update_jaxpr'),
    (_reshape, 'reshape', 'dimensions new_sizes sharding'),
    (lambda op, axes: op.params['broadcast_dimensions'][_same(op, axes)], 'broadcast_in_dim',
        'broadcast_dimensions shape sharding'),
    (lambda op, axes: tuple(op.params['permutation']).index(axes[0]), 'transpose', 'permutation'),
    (_kept(lambda params, shape, a: params['reps'][a] == 1), 'tile', 'reps'),
    (_kept(_is_apart_in_windows), 'reduce_window_sum reduce_window_max reduce_window_min', _WINDOWS),
    (_kept(_is_apart_in_windows), 'reduce_window', _WINDOWS + ' jaxpr consts'),
    (_kept(_is_apart_in_windows), 'select_and_gather_add', _WINDOWS + ' select_prim'),
    (_kept(lambda params, shape, a: a not in params['dimensions']), 'rev', 'dimensions'),
    (_kept(lambda params, shape, a: tuple(params['padding_config'][a]) == (0, 0, 0)), 'pad',
        'padding_config'),
    (_kept(_is_whole_slice), 'slice', 'start_indices limit_indices strides'),
    (_kept(lambda params, shape, a: params['slice_sizes'][a] == shape[a]), 'dynamic_slice', 'slice_sizes'),
    (_dynamic_update_slice, 'dynamic_update_slice', ''),
    (_kept(lambda params, shape, a: a < len(shape) - len(params['fft_lengths'])), 'fft',
        'fft_type fft_lengths'),
    (None, 'jit pjit', '''jaxpr name inline keep_unused donated_invars in_shardings out_shardings
        in_layouts out_layouts ctx_mesh compiler_options_kvs'''),
    (None, 'closed_call core_call', 'call_jaxpr'),
    (None, 'remat2 remat checkpoint', 'jaxpr prevent_cse differentiated policy'),
    (None, 'custom_jvp_call', 'call_jaxpr jvp_jaxpr_fun num_consts symbolic_zeros'),
    (None, 'custom_vjp_call', 'call_jaxpr fwd_jaxpr_thunk bwd num_consts out_trees symbolic_zeros'),
    (None, 'custom_linear_solve', 'const_lengths jaxprs'), (None, 'stop_gradient optimization_barrier', ''),
    (None, 'device_put', 'devices srcs copy_semantics'), (None, 'cond', 'branches'),
    (None, 'scan', 'jaxpr length reverse unroll num_consts num_carry linear _split_transpose ft_in ft_out'),
    (None, 'while', 'cond_nconsts cond_jaxpr body_nconsts body_jaxpr')]
_RULES: dict[str, tuple[Rule | None, frozenset[str]]] = {
    name: (rule, frozenset(known.split())) for rule, names, known in _TABLE for name in names.split()}
# fmt: on

"""The jitted training step and evaluation, on a mesh with a data axis, and their input data.

Every device has all parameters and gets its part of the batch; gradients are summed over devices.
All random numbers are keyed by the step and the position in the global batch, so they do not depend
on the number of devices.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lfg_jax.data.datasets import Arrays, epoch_order, sequential_order, take
from lfg_jax.data.streaming import Batch, Stream
from lfg_jax.training.rules.algorithms import Algorithm

PyTree = Any
AXIS = 'data'
STAGE = 'stage'  # the axis of the block pipeline; see `pipeline`


class TrainState(NamedTuple):
  """Everything that changes during training; the content of a checkpoint.

  Attributes:
    step: number of updates done.
    params: the parameters, which the optimizer updates.
    rest: the algorithm's other variables ('batch_stats', 'feedback', 'lookahead', 'control_variate',
      'control_variate_optimizer').
    opt_state: the optimizer's state.
    sums: sums of the algorithm's metrics, and 'examples', since the epoch began. With them, a run
      that resumes within an epoch reports the same means.
    bad_step: number, from 1, of the first step whose loss or update was not finite; -1: none.
  """

  step: jax.Array
  params: PyTree
  rest: dict[str, PyTree]
  opt_state: PyTree
  sums: dict[str, jax.Array]
  bad_step: jax.Array


def make_mesh(stages: int = 1) -> Mesh:
  """A mesh of all devices with a data axis and, if there are several stages, a stage axis.

  The devices of one pipeline are neighbours on the stage axis.
  """
  count, axes = jax.device_count(), (AXIS, STAGE) if stages > 1 else (AXIS,)
  shape = (count // stages, stages)[: len(axes)]
  return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))


def flat(mesh: Mesh) -> Mesh:
  """A mesh of the same devices with a data axis only."""
  return Mesh(mesh.devices.reshape(-1), (AXIS,), axis_types=(AxisType.Auto,))


def init_state(
  algorithm: Algorithm, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> TrainState:
  """The state before the first step, on every device."""

  def init(key: jax.Array) -> TrainState:
    rest = algorithm.init(key)
    params = rest.pop('params')
    sums = {name: jnp.zeros(()) for name in (*algorithm.metrics, 'examples')}
    return TrainState(
      jnp.zeros((), jnp.int32),
      params,
      rest,
      optimizer.init(params),
      sums,
      jnp.full((), -1, jnp.int32),
    )

  return jax.jit(init, out_shardings=NamedSharding(mesh, P()))(key)


class Feed(NamedTuple):
  """A split of the data, as inputs of jitted functions.

  Attributes:
    steps: number of batches in an epoch.
    fetch: `(*local inputs, step within the epoch) -> local batch`, called inside shard_map.
    specs: how the inputs are sharded.
    epoch: `(epoch, first step) -> iterator of (steps, inputs)`: `inputs` serve the next `steps`
      steps.
    at_once: the most steps in one dispatch, which the device takes without the host.
    is_stream: whether inputs are one batch; otherwise they are the whole epoch, the same for all
      steps.
  """

  steps: int
  fetch: Callable[..., Batch]
  specs: tuple[P, ...]
  epoch: Callable[[int, int], Iterator[tuple[int, tuple]]]
  at_once: int
  is_stream: bool


def make_feed(
  split: Arrays | Stream,
  mesh: Mesh,
  batch_size: int,
  key: jax.Array | None = None,
  *,
  at_once: int = 1,
) -> Feed:
  """The feed of a split, shuffled by `key` and the epoch; without a key, in the split's own order.

  A stream has its own seed, and is fed one step at a time whatever `at_once` is.
  """
  steps = -(-split.examples // batch_size)
  if isinstance(split, Stream):
    return _stream_feed(split, mesh, batch_size, steps)
  to_devices = functools.partial(jax.make_array_from_process_local_data, NamedSharding(mesh, P()))
  arrays = jax.tree.map(to_devices, split)
  specs = (P(), P(None, AXIS))

  @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, specs[1]))
  def order(epoch: int) -> jax.Array:
    if key is None:
      return sequential_order(split.examples, batch_size)
    return epoch_order(jax.random.fold_in(key, epoch), split.examples, batch_size)

  def epochs(epoch: int, first_step: int) -> Iterator[tuple[int, tuple]]:
    inputs = (arrays, order(epoch))
    return ((min(at_once, steps - step), inputs) for step in range(first_step, steps, at_once))

  def fetch(arrays: Arrays, order_SxB: jax.Array, step: jax.Array) -> Batch:
    return take(arrays, order_SxB[step])

  return Feed(steps, fetch, specs, epochs, at_once, is_stream=False)


def _stream_feed(stream: Stream, mesh: Mesh, batch_size: int, steps: int) -> Feed:
  to_devices = functools.partial(
    jax.make_array_from_process_local_data, NamedSharding(mesh, P(AXIS))
  )

  def epochs(epoch: int, first_step: int) -> Iterator[tuple[int, tuple]]:
    batches = stream.epoch(epoch, first_step, batch_size, *_share(mesh))
    return ((1, (jax.tree.map(to_devices, batch),)) for batch in batches)

  return Feed(steps, lambda batch, step: batch, (P(AXIS),), epochs, at_once=1, is_stream=True)


def batch_like(image_shape: tuple[int, int, int], batch_size: int) -> Batch:
  """Shapes and dtypes of a global batch."""
  of = lambda shape, dtype: cast(Any, jax.ShapeDtypeStruct((batch_size, *shape), dtype))
  return Batch(of(image_shape, jnp.uint8), of((), jnp.int32), of((), jnp.float32))


def _share(mesh: Mesh) -> tuple[int, int]:
  """(index, number of parts): the part of every batch that this process reads.

  Processes that are stages of one pipeline read the same part.
  """
  if STAGE not in mesh.axis_names:
    return jax.process_index(), jax.process_count()
  here = [
    any(device.process_index == jax.process_index() for device in row) for row in mesh.devices
  ]
  return here.index(True) // sum(here), len(here) // sum(here)


def make_gradient(
  algorithm: Algorithm, mesh: Mesh, feed: Feed
) -> Callable[..., tuple[PyTree, dict[str, Any]]]:
  """Makes `gradient(state, key, *inputs) -> (grads, aux)` of the global batch.

  `aux` has 'examples', the number of examples. The algorithm must be made with AXIS as its
  axis_name.
  """

  def local_gradient(state: TrainState, key: jax.Array, *inputs: Any) -> tuple[PyTree, dict]:
    batch = feed.fetch(*inputs, state.step % feed.steps)
    examples = jax.lax.psum(batch.weight.sum(), AXIS)
    batch = batch._replace(weight=batch.weight / examples)
    key = jax.random.fold_in(key, state.step)
    grads, aux = algorithm.gradient({'params': state.params, **state.rest}, key, batch)
    stats = aux.pop('batch_stats')
    grads, aux = jax.lax.psum((grads, aux), AXIS)
    return grads, {**aux, 'examples': examples, 'batch_stats': stats}

  # With check_vma, jax.grad inside would sum over devices by itself, because all devices have the
  # same parameters, but jax.jvp along a tangent would not. Without it, neither does, and the psum
  # above serves all rules.
  return jax.shard_map(
    local_gradient, mesh=mesh, in_specs=(P(), P(), *feed.specs), out_specs=P(), check_vma=False
  )


def make_update(
  algorithm: Algorithm, optimizer: optax.GradientTransformation, mesh: Mesh, feed: Feed
) -> Callable[..., TrainState]:
  """Makes the jitted `update(state, key, steps, *inputs) -> state`, which takes `steps` steps.

  It takes a single step if `feed.at_once` is 1. The memory of `state` is donated.
  """
  gradient = make_gradient(algorithm, mesh, feed)

  def one_step(state: TrainState, key: jax.Array, *inputs: Any) -> TrainState:
    grads, aux = gradient(state, key, *inputs)
    examples = aux.pop('examples')
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    is_finite = jnp.isfinite(aux['loss']) & jnp.isfinite(optax.tree.norm(updates))
    means = {name: aux[name] for name in algorithm.metrics}
    is_first = state.step % feed.steps == 0
    params = optax.apply_updates(state.params, updates)
    return TrainState(
      state.step + 1,
      params,
      algorithm.advance(state.rest, params, aux),
      opt_state,
      add_to_sums(state.sums, means, examples, is_first),
      jnp.where((state.bad_step < 0) & ~is_finite, state.step + 1, state.bad_step),
    )

  def update(state: TrainState, key: jax.Array, steps: jax.Array, *inputs: Any) -> TrainState:
    if feed.at_once == 1:
      return one_step(state, key, *inputs)
    return jax.lax.fori_loop(0, steps, lambda _, state: one_step(state, key, *inputs), state)

  return jax.jit(update, donate_argnums=0, out_shardings=NamedSharding(mesh, P()))


def add_to_sums(
  sums: dict[str, jax.Array], means: dict[str, jax.Array], examples: jax.Array, is_first: jax.Array
) -> dict[str, jax.Array]:
  """The epoch's sums with a batch's `means`, times `examples`, added.

  If the batch is the first of its epoch, the sums start from zero.
  """
  new = {**{name: mean * examples for name, mean in means.items()}, 'examples': examples}
  return {name: jnp.where(is_first, 0, sums[name]) + value for name, value in new.items()}


def make_error(algorithm: Algorithm, mesh: Mesh, feed: Feed) -> Callable[..., float]:
  """Makes `error(state)`: the fraction of a split's examples that are misclassified.

  Every example counts once; padding does not count. `error(state, batches)` has a stream's batches
  go through the function `batches`, which may end them early.
  """

  def local_count(
    params: PyTree, rest: dict[str, PyTree], steps_S: jax.Array, *inputs: Any
  ) -> jax.Array:
    def add(counts: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
      batch = feed.fetch(*inputs, step)
      logits_BxK = algorithm.predict({'params': params, **rest}, jnp.asarray(batch.image))
      wrong_B = logits_BxK.argmax(-1) != batch.label
      return counts + jnp.stack(
        [jnp.where(wrong_B, batch.weight, 0).sum(), batch.weight.sum()]
      ), None

    return jax.lax.psum(jax.lax.scan(add, jnp.zeros(2), steps_S)[0], AXIS)

  count = jax.jit(
    jax.shard_map(
      local_count, mesh=mesh, in_specs=(P(), P(), P(), *feed.specs), out_specs=P(), check_vma=False
    )
  )

  def error(state: TrainState, batches: Callable[[Iterator], Iterator] = iter) -> float:
    if feed.is_stream:
      counts = jnp.zeros(2)
      for _, inputs in batches(feed.epoch(0, 0)):
        before, counts = counts, counts + count(state.params, state.rest, jnp.arange(1), *inputs)
        jax.block_until_ready(before)  # so that no end has to wait for more than two batches
    else:
      _, inputs = next(feed.epoch(0, 0))
      counts = count(state.params, state.rest, jnp.arange(feed.steps), *inputs)
    return float(counts[0] / counts[1])

  return error

"""Objectives: what a network learns from, and how an estimator is applied to it.

| | losses | gradient flows between blocks |
|---|---|---|
| `end_to_end` | the read-out's, and with `local=True` all local ones | yes |
| `stage_by_stage` | local ones; the read-out learns on top, detached | no |

In contrastive learning, the local losses are contrastive. If there are none, a projection at the
end of the network has the contrastive loss. The read-out is then always detached.

Both functions return `run(variables, key, x, targets) -> (grads, aux)`. aux has the sums over this
device's examples of 'loss', 'error' and, in contrastive learning, 'contrastive_loss'. It also has
'batch_stats' and, stage by stage, 'control_variate_gradient' (see `blockwise`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators.exact_tail import Estimator
from lfg_jax.local import info_nce, staged
from lfg_jax.local.blockwise import blockwise, stages
from lfg_jax.local.replicated import Cut
from lfg_jax.local.row_losses import cross_entropy
from lfg_jax.local.staged import StagedModel, Variables, variables_of
from lfg_jax.local.targets import Targets

PyTree = Any
Run = Callable[[Variables, jax.Array, jax.Array, Targets], tuple[PyTree, dict[str, Any]]]
_UNCUT = Cut(patch=False, group=False)


def end_to_end(model: StagedModel, estimator: Estimator, *, local: bool) -> Run:
  """The whole network as one loss function.

  It has the read-out's loss. With `local`, it also has all local losses, and the read-out is
  detached.
  """
  contrast = model.contrast
  project = contrast is not None and not local

  def run(
    variables: Variables, key: jax.Array, x: jax.Array, targets: Targets
  ) -> tuple[PyTree, dict]:
    fixed = {kind: tree for kind, tree in variables.items() if kind != 'params'}

    def loss(params: PyTree, x: jax.Array, targets: Targets) -> tuple[tuple, dict]:
      now = {**fixed, 'params': params}
      y, local_losses, updates = staged.apply(model, now, x, targets, _UNCUT if local else None)
      end = None
      if contrast and project:
        assert model.project
        anchors, candidates, updates_of_head = model.project(
          variables_of(now, 'head'), y, targets.weight_B
        )
        end, output_error = info_nce.end_losses((anchors, candidates), targets.weight_B, contrast)
        local_losses = [*local_losses, end[None, :, None, None]]
        staged.merge(updates, 'head', updates_of_head)
      y = jax.lax.stop_gradient(y) if local or contrast else y
      logits, _, updates_of_readout = model.read_out(
        variables_of(now, 'readout'), y, targets.weight_B
      )
      staged.merge(updates, 'readout', updates_of_readout)
      aux = _summary(logits, targets)
      if end is not None:
        aux['output_error'] = output_error
      stacks = [losses.sum(0) for losses in local_losses]
      aux['local_loss'] = sum((losses.mean((1, 2)) for losses in stacks), jnp.zeros(()))
      return (aux['loss'][:, None, None], *stacks), {**aux, **updates}

    (_, aux), grads = estimator(loss, None)(variables['params'], key, x, targets)
    metrics = _sums(aux)
    if contrast:
      metrics['contrastive_loss'] = aux['local_loss'].sum() / (1 if project else model.depth)
    return grads, metrics | {'batch_stats': aux.get('batch_stats', {})}

  return run


def stage_by_stage(
  model: StagedModel, estimator: Estimator, cut: Cut, *, every: int = 1, overlap: bool = False
) -> Run:
  """Every stage in turn learns from its local losses; then the read-out learns from the output."""
  run_stages = blockwise(estimator, model, cut, every=every, overlap=overlap)

  def run(
    variables: Variables, key: jax.Array, x: jax.Array, targets: Targets
  ) -> tuple[PyTree, dict]:
    x, local_loss_B, grads, updates = run_stages(variables, key, x, targets)
    aux = with_read_out(model, variables, x, targets, grads, updates)
    return grads, aux | local_metrics(model, local_loss_B, every, overlap)

  return run


def with_read_out(
  model: StagedModel,
  variables: Variables,
  x: jax.Array,
  targets: Targets,
  grads: PyTree,
  updates: PyTree,
) -> dict[str, Any]:
  """Adds the read-out, which learns from the last block's output x, detached.

  Args:
    grads, updates: results of `blockwise`, to which the read-out's are added in place.

  Returns:
    The updates, and the sums of 'loss' and 'error' over this device's examples.
  """
  stats = updates['batch_stats']
  readout = variables_of(variables, 'readout')
  if 'readout' in stats:
    readout['batch_stats'] = stats['readout']

  def objective(params: PyTree) -> tuple[jax.Array, tuple[dict, Variables]]:
    logits, _, updates = model.read_out({**readout, 'params': params}, x, targets.weight_B)
    aux = _summary(logits, targets)
    return aux['loss'].sum(), (aux, updates)

  grads['readout'], (aux, new) = jax.grad(objective, has_aux=True)(readout['params'])
  if 'batch_stats' in new:
    stats['readout'] = new['batch_stats']
  return _sums(aux) | updates


def local_metrics(
  model: StagedModel, local_loss_B: jax.Array, every: int = 1, overlap: bool = False
) -> dict[str, jax.Array]:
  """The contrastive loss, as a mean over stages; nothing if stages do not learn from it."""
  if model.contrast is None:
    return {}
  return {'contrastive_loss': local_loss_B.sum() / len(stages(model.depth, every, overlap))}


def _summary(logits_BxK: jax.Array, targets: Targets) -> dict[str, jax.Array]:
  """The read-out's weighted loss and error per example, and the loss's derivative by the logits."""
  label_B, weight_B = targets
  one_hot_BxK = jax.nn.one_hot(label_B, logits_BxK.shape[-1], dtype=logits_BxK.dtype)
  return {
    'loss': cross_entropy(logits_BxK, targets) * weight_B,
    'error': jnp.where(logits_BxK.argmax(-1) != label_B, weight_B, 0),
    'output_error': (jax.nn.softmax(logits_BxK) - one_hot_BxK) * weight_B[:, None],
  }


def _sums(aux: dict[str, Any]) -> dict[str, jax.Array]:
  """Sums loss and error over this device's examples."""
  return {'loss': aux['loss'].sum(), 'error': aux['error'].sum()}

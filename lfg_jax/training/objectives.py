"""What a network learns from, and how an estimator is led through it.

| | losses | gradient flows between blocks |
|---|---|---|
| `end_to_end` | the read-out's, and with `local=True` all local ones | yes |
| `stage_by_stage` | local ones; the read-out learns on top, detached | no |

With the contrastive loss, the local losses are contrastive, and where there are none, that of a projection at the
end of the network. The read-out is always detached.

Both return `run(variables, key, tokens [B, P, D], criterion) -> (grads, aux)`; aux has 'batch_stats', stage by stage
also 'guess_gradient' (see `greedy`), and the sums over this device's examples of
'loss', 'error' and, where there is one, 'contrastive_loss'.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lfg_jax.estimators.boundary import Estimator
from lfg_jax.losses import info_nce
from lfg_jax.losses.info_nce import Contrast
from lfg_jax.losses.replicated import Cut, cross_entropy
from lfg_jax.models.mixer import Criterion, LocalMixer, MixerSpec, ReadOut
from lfg_jax.training.greedy import greedy, stages

PyTree = Any
Run = Callable[[dict[str, PyTree], jax.Array, jax.Array, Criterion], tuple[PyTree, dict[str, Any]]]


def end_to_end(spec: MixerSpec, estimator: Estimator, *, local: bool) -> Run:
  """The whole network as one loss function: the read-out's loss, or with `local` detached and all local ones."""
  contrast = spec.style.contrast
  project = contrast is not None and not local
  model = LocalMixer(spec, detach_readout=local or contrast is not None, project=project)

  def run(variables: dict[str, PyTree], key: jax.Array, tokens_BxPxD: jax.Array, criterion: Criterion
          ) -> tuple[PyTree, dict]:
    fixed = {name: tree for name, tree in variables.items() if name != 'params'}

    def loss(params: PyTree, tokens: jax.Array, criterion: Criterion) -> tuple[tuple, dict]:
      (logits, local_losses), updates = model.apply({**fixed, 'params': params}, tokens, criterion if local else None,
                                                    criterion.weight_B, mutable=('batch_stats',))
      aux = _summary(logits, criterion)
      if contrast and project:
        end_B, aux['output_error'] = info_nce.end_losses(local_losses.pop('head'), criterion.weight_B, contrast)
        local_losses['head'] = end_B[None, :, None, None]
      stacks = [losses.reshape(-1, *losses.shape[-3:]).sum(0) for losses in jax.tree.leaves(local_losses)]
      aux['local_loss'] = sum((losses.mean((1, 2)) for losses in stacks), jnp.zeros(()))
      return (aux['loss'][:, None, None], *stacks), {**aux, **updates}

    (_, aux), grads = estimator(loss, None)(variables['params'], key, tokens_BxPxD, criterion)
    heads = 1 if project else sum(run.count for run in spec.runs)
    return grads, _metrics(aux, aux['local_loss'], heads, contrast) | {'batch_stats': aux.get('batch_stats', {})}
  return run


def stage_by_stage(spec: MixerSpec, estimator: Estimator, cut: Cut, *, every: int = 1, overlap: bool = False) -> Run:
  """Stage after stage by their local losses, then the read-out on what comes out."""
  run_stages = greedy(estimator, spec, cut, every=every, overlap=overlap)
  heads = len(stages(sum(run.count for run in spec.runs), every, overlap))
  readout = ReadOut(spec.style, spec.classes)

  def run(variables: dict[str, PyTree], key: jax.Array, tokens_BxPxD: jax.Array, criterion: Criterion
          ) -> tuple[PyTree, dict]:
    x, local_loss_B, grads, updates_of_stages = run_stages(variables, key, tokens_BxPxD, criterion)
    stats = updates_of_stages['batch_stats']
    fixed = {'batch_stats': stats['readout']} if 'readout' in stats else {}

    def objective(params: PyTree) -> tuple[jax.Array, tuple[dict, PyTree]]:
      logits, updates = readout.apply({'params': params, **fixed}, x, criterion.weight_B, mutable=('batch_stats',))
      aux = _summary(logits, criterion)
      return aux['loss'].sum(), (aux, updates)

    grads['readout'], (aux, updates) = jax.grad(objective, has_aux=True)(variables['params']['readout'])
    if 'batch_stats' in updates:
      stats['readout'] = updates['batch_stats']
    return grads, _metrics(aux, local_loss_B, heads, spec.style.contrast) | updates_of_stages
  return run


def _summary(logits_BxK: jax.Array, criterion: Criterion) -> dict[str, jax.Array]:
  """Weighted loss and error of the read-out, per example, and the loss's derivative by the logits."""
  label_B, weight_B = criterion
  one_hot_BxK = jax.nn.one_hot(label_B, logits_BxK.shape[-1], dtype=logits_BxK.dtype)
  return {'loss': cross_entropy(logits_BxK, label_B) * weight_B,
          'error': jnp.where(logits_BxK.argmax(-1) != label_B, weight_B, 0),
          'output_error': (jax.nn.softmax(logits_BxK) - one_hot_BxK) * weight_B[:, None]}


def _metrics(aux: dict[str, Any], local_loss_B: jax.Array, heads: int, contrast: Contrast | None
             ) -> dict[str, jax.Array]:
  """Sums over this device's examples; the contrastive loss is the mean over heads."""
  means = {'loss': aux['loss'].sum(), 'error': aux['error'].sum()}
  return {**means, 'contrastive_loss': local_loss_B.sum() / heads} if contrast else means

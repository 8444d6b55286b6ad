"""Checks that a rule and its options fit a model."""

from lfg_jax.local.staged import StagedModel
from lfg_jax.training.rules.rules import REGISTRY, Options, Rule


def check(rule: Rule, options: Options, model: StagedModel) -> None:
  """Raises a one-line ValueError if the model does not allow the rule or its options."""
  independent = rule.estimator == 'weight' and options.sharing == 'independent'
  if model.mixes_examples and independent:
    raise ValueError(
      "estimator.sharing='independent' perturbs weights per example, which "
      "model.norm='batch' mixes; allowed with batch norm: 'paper', 'shared'"
    )
  if model.mixes_examples and rule.estimator == 'activity' and options.sharing == 'shared':
    raise ValueError(
      "estimator.sharing='shared' has one tangent for all examples, which "
      "model.norm='batch' mixes; allowed with batch norm: 'paper', 'independent'"
    )
  if options.micro_batch and depends_on_others(model):
    raise ValueError(
      f'micro_batch is {options.micro_batch}, and the losses of one example depend '
      'on others; allowed here: 0'
    )
  if options.head_ahead:
    _ahead(rule, options, model)
  if model.contrast and independent:
    raise ValueError(
      "estimator.sharing='independent' perturbs weights per example, and "
      "objective='contrastive' compares examples; allowed with it: 'paper', 'shared'"
    )


def _ahead(rule: Rule, options: Options, model: StagedModel) -> None:
  """Raises a one-line ValueError if heads cannot look ahead."""
  if not rule.local or rule.feedback:
    names = ', '.join(name for name, r in REGISTRY.items() if r.local and not r.feedback)
    raise ValueError(
      'losses.head_ahead=True is for rules with local losses, but not for feedback alignment; '
      f'allowed: False, or one of {names}'
    )
  if rule.estimator == 'weight' and options.credit == 'paper':
    raise ValueError(
      "estimator.credit='paper' credits a layer with its own group's losses, but with "
      "losses.head_ahead=True they depend on all groups; allowed: 'exact'"
    )
  if model.mixes_examples:
    raise ValueError(
      "losses.head_ahead=True has no average of the statistics of model.norm='batch'; allowed with it: "
      'False'
    )


def depends_on_others(model: StagedModel) -> bool:
  """Whether an example's losses depend on other examples, so that the batch must stay whole."""
  return model.mixes_examples or model.contrast is not None

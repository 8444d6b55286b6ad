"""Predicts a training step's memory, operations, bytes and time on N devices, without having them.

    python experiments/bench/dry_run.py --devices=N[,N …] [--stages=S[,S …]] [--batch_per_device=B]
        [--flops=1e14] [--link=1e11] [--config=NAME or FILE] [--config.field=value …] [--out=DIR]

The program compiles the step for N virtual devices on one CPU, and runs nothing. The batch has
config.batch_size examples, or N·B. The predicted time is operations / --flops + bits sent / --link:
a device attains --flops operations per second and sends --link bits per second. Nothing overlaps,
and latency is not counted. With several stages, a step is a tick of the pipeline; to fill and drain
the pipeline takes another S - 1 ticks per epoch. DIR gets dry_run.json and dry_run.md.
"""

import copy
import time
from typing import Any

import step_cost
from ml_collections import ConfigDict

from lfg_jax.errors import as_user_errors
from lfg_jax.training import command_line, configs
from lfg_jax.training.run import results

Row = dict[str, Any]


def main(arguments: list[str]) -> None:
  """Compiles, prints and writes."""
  parser = results.parser(__doc__, out='runs/dry_run', config='imagenet')
  parser.numbers('devices', '8')
  parser.numbers('stages', '1')
  parser.number('batch_per_device', None, 'default: config.batch_size of all devices together')
  parser.number('flops', 1e14, 'operations per second', kind=float)
  parser.number('link', 1e11, 'bits per second', kind=float)
  options, config = command_line.parse(parser, arguments)
  configs.validate(config)
  step_cost.virtual_devices(max(options.devices))
  rows = []
  for count in options.devices:
    for number in options.stages:
      rows.append(row(config, count, number, options.batch_per_device, options.flops, options.link))
      print(table(rows[-1:]).splitlines()[-1], flush=True)
  folder = results.Folder(options.out, __file__, arguments)
  folder.write('dry_run', flops=options.flops, link=options.link, rows=rows)
  folder.write_table('dry_run', table(rows))


def row(
  config: ConfigDict,
  devices: int,
  stages: int,
  batch_per_device: int | None,
  flops: float,
  link: float,
) -> Row:
  """The row for one number of devices and one number of stages."""
  config = copy.deepcopy(config)
  config.pipeline_stages = stages
  if batch_per_device:
    config.batch_size = devices * batch_per_device
  begin = time.perf_counter()
  with as_user_errors():
    cost = step_cost.cost(config, devices)
  seconds = cost.seconds(flops, link)
  return {
    'algorithm': config.algorithm,
    'model': config.model.get('size', config.model.name),
    'devices': devices,
    'stages': stages,
    'batch_size': config.batch_size,
    'parameters': cost.parameters,
    'state_bytes': cost.state,
    'temporaries_bytes': cost.temporaries,
    'flop': cost.flop,
    'sent_bytes': cost.sent,
    'collectives': {kind: sent._asdict() for kind, sent in cost.collectives.items()},
    'step_seconds': seconds,
    'examples_per_second': config.batch_size / seconds,
    'compile_seconds': round(time.perf_counter() - begin, 1),
  }


def table(rows: list[Row]) -> str:
  """A Markdown table of quantities per device."""
  head = (
    'devices | stages | batch | parameters, M | state, MiB | temporaries, MiB | GFLOP '
    '| sent, MiB | step, ms | steps/s | examples/s'
  )
  cells = [
    [
      str(r['devices']),
      str(r['stages']),
      str(r['batch_size']),
      f'{r["parameters"] / 1e6:.2f}',
      f'{r["state_bytes"] / 2**20:.1f}',
      f'{r["temporaries_bytes"] / 2**20:.0f}',
      f'{r["flop"] / 1e9:.2f}',
      sent(r),
      f'{1e3 * r["step_seconds"]:.1f}',
      f'{1 / r["step_seconds"]:.2f}',
      f'{r["examples_per_second"]:.0f}',
    ]
    for r in rows
  ]
  return (
    f'{rows[0]["model"]}, {rows[0]["algorithm"]}; per device and step\n\n'
    f'{results.in_table(head, cells)}\n'
  )


def sent(row: Row) -> str:
  """MiB sent by each kind of collective operation."""
  parts = [f'{kind} {found["sent"] / 2**20:.2f}' for kind, found in row['collectives'].items()]
  return ', '.join(parts) or '0'


if __name__ == '__main__':
  command_line.run(main)

"""Downloads a data set and writes array_record files, which training reads without TensorFlow.

    pip install tensorflow
    lfg-prepare-data --dataset=cifar10 --data_dir=DIR

ImageNet must be downloaded by hand: register at https://image-net.org/download-images, and put
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar in the folder that --manual_dir names.
"""

import difflib
import importlib.util
import pathlib

import tensorflow_datasets as tfds

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.training import command_line

TARS = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')


def check(dataset: str, manual_dir: pathlib.Path | None) -> None:
  """Raises UserError if the name is unknown or something that the user must provide is missing."""
  known = tfds.list_builders(with_community_datasets=False)
  if dataset not in known:
    near = difflib.get_close_matches(dataset, known, 1)
    hint = f'did you mean {near[0]}? ' if near else ''
    raise UserError(f'--dataset is {dataset!r}; {hint}allowed: names of TFDS')
  if dataset == 'imagenet2012':
    missing = [tar for tar in TARS if not manual_dir or not (manual_dir / tar).exists()]
    if missing:
      raise UserError(
        f'imagenet2012 must be downloaded by hand, from https://image-net.org/download-images: '
        f'{", ".join(missing)} not found; name their folder with --manual_dir'
      )
  if importlib.util.find_spec('tensorflow') is None:
    raise UserError(
      'preparing data needs TensorFlow (training does not); install it with: pip install tensorflow'
    )


def main(arguments: list[str]) -> None:
  """Prepares one data set."""
  parser = command_line.Parser(__doc__)
  names = f'{", ".join(data.TFDS)}, or another name of TFDS'
  parser.option('dataset', None, names, required=True)
  parser.path('data_dir', None, 'where to; default: $TFDS_DATA_DIR or ~/tensorflow_datasets')
  parser.path('manual_dir', None, 'where the two tar files of ImageNet are')
  given = parser.parse(arguments)
  check(given.dataset, given.manual_dir)
  builder = tfds.builder(given.dataset, data_dir=given.data_dir, file_format='array_record')
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=given.manual_dir)
  )
  print(
    f'{given.dataset} is in {builder.data_dir}:',
    {split: info.num_examples for split, info in builder.info.splits.items()},
  )


def run() -> None:
  """The console script."""
  command_line.run(main)


if __name__ == '__main__':
  run()

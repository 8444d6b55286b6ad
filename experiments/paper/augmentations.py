"""A contact sheet of the two views: to look at what contrastive learning is told not to see.

    python experiments/paper/augmentations.py [--dataset=cifar10] [--data_dir=DIR] [--images=8]
        [--draws=3] [--min_area=0.08] [--out=runs/augmentations.png]

Columns: images. First row: the image; then pairs of rows: view 1, view 2.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from lfg_jax import data
from lfg_jax.data import augmentation
from lfg_jax.errors import UserError, as_user_errors
from lfg_jax.training import command_line


def main(arguments: list[str]) -> None:
  """Draws the sheet."""
  parser = command_line.Parser(description=__doc__)
  parser.add_argument('--dataset', default='cifar10', help='default: cifar10')
  parser.add_argument('--data_dir', help='of TFDS')
  parser.add_argument('--images', type=int, default=8, help='default: 8')
  parser.add_argument('--draws', type=int, default=3, help='pairs of views of each; default: 3')
  parser.add_argument('--min_area', type=float, default=0.08, help='of a crop; default: 0.08')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/augmentations.png'))
  options = parser.parse_args(arguments)
  command_line.at_least(options, images=1, draws=1)
  if not 0 < options.min_area <= 1:
    raise UserError(f'--min_area is {options.min_area}; allowed: more than 0, at most 1')
  with as_user_errors():
    split = data.load(options.dataset, data_dir=options.data_dir).train
  if not isinstance(split, data.Arrays):
    raise UserError(f'{options.dataset} is a stream; allowed: data sets that fit memory')
  image = jnp.asarray(split.image_NxHxWxC[:options.images])
  rows = [image]
  view = jax.jit(lambda keys: augmentation.views(keys, image, options.min_area))
  for draw in range(options.draws):
    both = view(jax.random.split(jax.random.key(draw), len(image)))
    rows += [both[0::2], both[1::2]]
  options.out.parent.mkdir(parents=True, exist_ok=True)
  sheet(np.asarray(jnp.stack(rows)) / 255).savefig(options.out, dpi=100)
  print(options.out)


def sheet(image_RxNxHxWxC: np.ndarray) -> Figure:
  """Rows of images, with the name of the view at the left."""
  rows, columns = image_RxNxHxWxC.shape[:2]
  figure = Figure(figsize=(columns, rows), layout='constrained')
  for row, panels in enumerate(figure.subplots(rows, columns, squeeze=False)):
    for axes, image in zip(panels, image_RxNxHxWxC[row], strict=True):
      axes.imshow(np.clip(image, 0, 1), cmap='gray', vmin=0, vmax=1)
      axes.set(xticks=[], yticks=[])
    panels[0].set_ylabel('image' if row == 0 else f'view {2 - row % 2}')
  return figure


if __name__ == '__main__':
  command_line.run(main)

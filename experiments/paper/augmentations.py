"""Draws a contact sheet of views, to show which changes contrastive learning must ignore.

    python experiments/paper/augmentations.py [--dataset=cifar10] [--data_dir=DIR] [--images=8]
        [--draws=3] [--min_area=0.08] [--out=DIR]

DIR gets augmentations.png. Every column shows one image: the image itself in the first row, then
pairs of rows with view 1 and view 2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from lfg_jax import data
from lfg_jax.data import augmentation
from lfg_jax.errors import UserError, as_user_errors
from lfg_jax.training import command_line
from lfg_jax.training.run import results


def main(arguments: list[str]) -> None:
  """Draws the sheet."""
  parser = results.parser(__doc__, out='runs/augmentations')
  parser.option('dataset', 'cifar10')
  parser.option('data_dir', None, 'folder of the data sets')
  parser.number('images', 8)
  parser.number('draws', 3, 'pairs of views of each')
  parser.option('min_area', 0.08, 'smallest area of a crop, as a fraction of the image', kind=float)
  options = parser.parse(arguments)
  if not 0 < options.min_area <= 1:
    raise UserError(f'--min_area is {options.min_area}; allowed: more than 0, at most 1')
  with as_user_errors():
    split = data.load(options.dataset, data_dir=options.data_dir).train
  if not isinstance(split, data.Arrays):
    raise UserError(f'{options.dataset} is a stream; allowed: data sets that fit memory')
  image = jnp.asarray(split.image_NxHxWxC[: options.images])
  rows = [image]
  view = jax.jit(lambda keys: augmentation.views(keys, image, options.min_area))
  for draw in range(options.draws):
    both = view(jax.random.split(jax.random.key(draw), len(image)))
    rows += [both[0::2], both[1::2]]
  path = results.Folder(options.out, __file__, arguments).path / 'augmentations.png'
  sheet(np.asarray(jnp.stack(rows)) / 255).savefig(path, dpi=100)
  print(path)


def sheet(image_RxNxHxWxC: np.ndarray) -> Figure:
  """A figure with rows of images, and the name of the view to the left of each row."""
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

"""Files of TFDS that have changed since they were written: named in one line, before any training."""

import pickle
import shutil

import numpy as np
import pytest

from lfg_jax import data
from lfg_jax.errors import UserError
from lfg_jax.training import train
from tests.data.test_new_data import labelled
from tests.data.test_streams import write_imagenet
from tests.runs import tiny

TRAIN = 'flags-train.array_record-00000-of-00001'
TEST = 'flags-validation.array_record-00000-of-00001'
INFO, FEATURES = 'dataset_info.json', 'features.json'


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
  """A data_dir with a data set, and its images."""
  place = tmp_path_factory.mktemp('sound')
  return place, labelled('flags', place)


@pytest.fixture
def folder(sound, tmp_path):
  """A copy to damage."""
  shutil.copytree(sound[0] / 'flags', tmp_path / 'flags')
  return tmp_path / 'flags' / '1.0.0'


def refused(folder, name='flags'):
  place = folder.parent.parent
  with pytest.raises(UserError) as error:
    train.prepare(tiny(dataset=name, data_dir=str(place)))
  message = str(error.value)
  assert '\n' not in message and message.endswith(
    f'; remove {folder} and run: pip install tensorflow; lfg-prepare-data --dataset={name} --data_dir={place}'
  )
  return message


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


def change(path, there, here):
  assert there in path.read_text()
  path.write_text(path.read_text().replace(there, here, 1))


@pytest.mark.parametrize('name', [TRAIN, TEST])
@pytest.mark.parametrize('size', [0, 200, 65536, 70000, 131071])
def test_a_truncated_file_is_named(folder, name, size):
  """A file that is cut where a block begins has no examples, without an error of array_record."""
  cut(folder / name, size)
  assert refused(folder).startswith(f'{folder / name} is damaged (')


@pytest.mark.parametrize('name', [TRAIN, TEST, FEATURES])
def test_a_missing_file_is_named(folder, name):
  (folder / name).unlink()
  assert refused(folder).startswith(f'{folder / name} is ')


@pytest.mark.parametrize('name', [INFO, FEATURES])
@pytest.mark.parametrize('text', ['', '{"name": ', '[1]', 'null', '{"a": 1}', '\0\0'])
def test_a_damaged_description_is_named(folder, name, text):
  (folder / name).write_text(text)
  assert refused(folder).startswith(f'{folder / name} is damaged (')


@pytest.mark.parametrize('number', [8, 10, 0])
def test_no_row_is_lost_where_the_numbers_differ(folder, number):
  change(folder / INFO, '"9"', f'"{number}"')
  assert f'it has 9 examples, dataset_info.json says {number}' in refused(folder)


def test_a_file_of_another_kind_is_named(folder):
  (folder / TRAIN).write_bytes(b'x' * 200_000)
  assert refused(folder).startswith(f'{folder / TRAIN} is damaged (')


def test_a_flipped_bit_is_named_or_changes_nothing(sound, folder):
  """One in padding changes nothing; no other goes unseen. The first 4,000 bytes have all examples."""
  whole, seen = (folder / TRAIN).read_bytes(), 0
  builder_files = sound[1]['train']
  for place in np.random.default_rng(0).integers(0, 4000, 60):
    changed = bytearray(whole)
    changed[place] ^= 1 << int(place) % 8
    (folder / TRAIN).write_bytes(bytes(changed))
    try:
      found = data.load('flags', data_dir=str(folder.parent.parent)).train
    except ValueError as error:
      assert str(error).startswith(f'{folder / TRAIN} is damaged (') and '\n' not in str(error)
      seen += 1
      continue
    assert found.examples == 9
    assert sorted(found.image_NxHxWxC.reshape(9, -1).tolist()) == sorted(
      builder_files.reshape(9, -1).tolist()
    )
  assert seen > 20


def test_streams_name_the_file(tmp_path):
  """A bit that flipped in the middle is found when its example is read, by a worker too."""
  write_imagenet(tmp_path)
  folder = next((tmp_path / 'imagenet2012').iterdir())
  shard = next(folder.glob('*train*'))
  dataset = data.load('imagenet2012', data_dir=str(tmp_path), image_size=8)
  source = pickle.loads(pickle.dumps(dataset.train.source))
  assert len(source) == 11 and source[10]['label'] == dataset.train.source[10]['label']
  changed = bytearray(shard.read_bytes())
  changed[300] ^= 1
  shard.write_bytes(bytes(changed))
  stream = data.load('imagenet2012', data_dir=str(tmp_path), image_size=8).train
  with pytest.raises(ValueError, match=f'^{shard} is damaged ') as error:
    list(stream.epoch(0, 0, 4))
  assert '\n' not in str(error.value)
  cut(shard, 70000)
  assert refused(folder, 'imagenet2012').startswith(f'{shard} is damaged (')

"""Mistakes on the command lines of all other scripts end in one line too."""

import pytest

from tests.test_bad_input import ALGORITHMS, run


@pytest.mark.parametrize('arguments, message', [
    ([], 'the following arguments are required: --algorithms'),
    (['--algorithms=BP,XX'], f"--algorithms has 'XX'; allowed: {ALGORITHMS}"),
    (['--algorithms=BP', '--seeds=a'], "--seeds is 'a'; allowed: numbers with commas between them"),
])  # fmt: skip
def test_compare(arguments, message, tmp_path, monkeypatch, capsys):
  given = [*arguments, f'--out={tmp_path / "out"}']
  assert run(monkeypatch, capsys, given, 'compare.py') == (2, '', f'compare.py: {message}\n')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('script, arguments, message', [
    ('paper/augmentations', ['--data_dir=/nowhere'], 'dataset cifar10 is not in /nowhere; prepare it with: '),
    ('paper/augmentations', ['--dataset=letters'], "unknown dataset 'letters'; allowed: "),
    ('paper/augmentations', ['--min_area=nan'], '--min_area is nan; allowed: more than 0, at most 1'),
    ('paper/augmentations', ['--images=0'], '--images is 0; allowed: 1 or more'),
    ('compare', ['--algorithms=BP', '--seeds=-1'], '--seeds has -1; allowed: 0 or more'),
    ('bench/depth', ['--algorithms=NOPE'], f"--algorithms has 'NOPE'; allowed: {ALGORITHMS}"),
    ('bench/depth', ['--blocks=2,x'], "--blocks is '2,x'; allowed: numbers with commas between them"),
    ('bench/depth', ['--blocks=0'], '--blocks has 0; allowed: 1 or more'),
    ('bench/depth', ['--model=Q/1/1'], "model.size is 'Q/1/1'; allowed: "),
    ('bench/depth', ['--batch=0'], '--batch is 0; allowed: 1 or more'),
    ('bench/dry_run', ['--stages=x'], "--stages is 'x'; allowed: numbers with commas between them"),
    ('bench/dry_run', ['--devices=6', '--stages=4'], 'stages is 4; allowed: divisors of 6, the number of devices'),
    ('bench/dry_run', ['--devices=64'], 'devices is 64; allowed: 1 … 8, as many as there are'),
    ('bench/dry_run', ['--stages=2', '--config.algorithm=BP'], 'stages is 2, but BP learns from a loss at the end'),
    ('bench/frontier', ['--passes=a'], "--passes is 'a'; allowed: numbers with commas between them"),
    ('bench/frontier', ['--laws=cauchy'], "--laws has 'cauchy'; allowed: "),
    ('linear_probe', ['--workdir=/nowhere'], '/nowhere is not the folder of a run: it has no config.json'),
    ('linear_probe', ['--workdir=/nowhere', '--l2=nan'], '--l2 is nan; allowed: 0 or more'),
    ('bench/input_speed', ['--photos=1'], '--photos is 1; allowed: 128 or more'),
    ('bench/pipeline_throughput', ['--cores=0'], '--cores has 1 of them; allowed: two'),
    ('bench/pipeline_throughput', ['--algorithm=BP'],
     "argument --algorithm: invalid choice: 'BP' (choose from "),
    ('prepare_data', ['--dataset=digits'], "--dataset is 'digits'; "),
    ('prepare_data', ['--dataset=imagenet2012'], 'imagenet2012 must be downloaded by hand'),
    ('paper/replicated_losses', ['--groups=3'], '3 groups do not divide --channels=512'),
    ('paper/replicated_losses', ['--many_patches=0'], '--many_patches has 0; allowed: 1 or more'),
    ('bench/step_time', ['--algorithms=NOPE'], f"--algorithms has 'NOPE'; allowed: {ALGORITHMS}"),
    ('bench/step_time', ['--precision=half'], "argument --precision: invalid choice: 'half'"),
    ('bench/throughput', ['--config.stages=2'], 'stages is 2; allowed: 1, as the bare update has it'),
    ('bench/throughput', ['--epochs=0'], '--epochs is 0; allowed: 1 or more'),
    ('bench/time_to_accuracy', ['--thresholds=x'], "--thresholds is 'x'; allowed: numbers with commas between them"),
    ('bench/time_to_accuracy', ['--config.dataset=digits'], 'digits has no default thresholds'),
    ('bench/torture', ['--minutes=-1'], '--minutes is -1.0; allowed: 0 or more'),
    ('bench/torture', ['--config.batch_size=0'], 'batch_size is 0; allowed: 1 or more'),
    ('paper/variance', ['--parts=mixer', '--data_dir=/nowhere'],
     'dataset cifar10 is not in /nowhere; prepare it with: '),
    ('paper/variance', ['--draws=1'], '--draws is 1; allowed: 2 or more'),
    ('paper/index', ['--results=/nowhere'], '--results is /nowhere; allowed: a folder'),
    ('paper/reproduce', ['figure6', '--seeds=a'],
     "--seeds is 'a'; allowed: numbers with commas between them"),
])  # fmt: skip
def test_scripts(script, arguments, message, tmp_path, monkeypatch, capsys):
  if script not in ('prepare_data', 'linear_probe', 'paper/index'):
    arguments = [*arguments, f'--out={tmp_path / "out"}']
  code, out, err = run(monkeypatch, capsys, arguments, f'{script}.py')
  assert (code, out, err.count('\n')) == (2, '', 1)
  assert err.startswith(f'{script.rpartition("/")[2]}.py: {message}')
  assert not (tmp_path / 'out').exists()


def test_compare_leaves_folders_of_others(tmp_path, monkeypatch, capsys):
  (tmp_path / 'thesis.tex').write_text('x')
  code, _, err = run(monkeypatch, capsys, ['--algorithms=BP', f'--out={tmp_path}'], 'compare.py')
  assert (code, err) == (
    2,
    f'compare.py: {tmp_path} exists and is not the folder of a comparison; '
    'name another with --out\n',
  )

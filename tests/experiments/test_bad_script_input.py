"""Mistakes on the command lines of all other scripts end in one line too."""

import pytest

from tests.training.test_bad_input import ALGORITHMS, run, told


# Arguments of a script, and facts of the line.
@pytest.mark.parametrize('script, arguments, facts', [
    ('compare', [], ('missing', '--algorithms')),
    ('compare', ['--algorithms=BP,XX'], ('--algorithms', 'XX', ALGORITHMS)),
    ('compare', ['--algorithms=BP', '--seeds=a'], ('--seeds', "'a'", '0 or more', 'commas')),
    ('compare', ['--algorithms=BP', '--seeds=-1'], ('--seeds', '-1', '0 or more')),
    ('compare', ['--algorithms=BP', '--epochs=2'], ('--epochs', '--config.epochs')),
    ('paper/augmentations', ['--data_dir=/nowhere'], ('cifar10', '/nowhere', 'prepare it with')),
    ('paper/augmentations', ['--dataset=letters'], ("'letters'", 'digits, mnist')),
    ('paper/augmentations', ['--min_area=nan'], ('--min_area', 'nan', 'more than 0, at most 1')),
    ('paper/augmentations', ['--images=0'], ('--images', '0', '1 or more')),
    ('bench/depth', ['--algorithms=NOPE'], ('--algorithms', 'NOPE', ALGORITHMS)),
    ('bench/depth', ['--blocks=2,x'], ('--blocks', "'2,x'", '1 or more', 'commas')),
    ('bench/depth', ['--blocks=0'], ('--blocks', '0', '1 or more')),
    ('bench/depth', ['--model=Q/1/1'], ('model.size', "'Q/1/1'")),
    ('bench/depth', ['--batch=0'], ('--batch', '0', '1 or more')),
    ('bench/depth', ['--epochs=2'], ('unknown option --epochs\n',)),  # it has no config
    ('bench/dry_run', ['--stages=x'], ('--stages', "'x'", '1 or more')),
    ('bench/dry_run', ['--devices=6', '--stages=4'], ('4', 'divisors of 6', 'devices')),
    ('bench/dry_run', ['--devices=64'], ('devices', '64', '1 … 8')),
    ('bench/dry_run', ['--stages=2', '--config.algorithm=BP'], ('2', 'BP', 'loss at the end')),
    ('bench/frontier', ['--num_tangents=a'], ('--num_tangents', "'a'", '1 or more')),
    ('bench/frontier', ['--distributions=cauchy'], ('--distributions', 'cauchy', 'rademacher')),
    ('linear_probe', [], ('missing', '--workdir')),
    ('linear_probe', ['--workdir=/nowhere'], ('/nowhere', 'not the folder of a run', 'config.json')),
    ('linear_probe', ['--workdir=/nowhere', '--l2=nan'], ('--l2', 'nan', '0 or more')),
    ('bench/input_speed', ['--photos=1'], ('--photos', '1', '128 or more')),
    ('bench/pipeline_throughput', ['--cores=0'], ('--cores', '1 of them', 'two')),
    ('bench/pipeline_throughput', ['--algorithm=BP'], ('--algorithm', "'BP'", 'LG-BP')),
    ('prepare_data', ['--dataset=digits'], ('--dataset', "'digits'")),
    ('prepare_data', ['--dataset=imagenet2012'], ('imagenet2012', 'downloaded by hand')),
    ('paper/replicated_losses', ['--groups=3'], ('3 groups', '--channels=512')),
    ('paper/replicated_losses', ['--many_patches=0'], ('--many_patches', '0', '1 or more')),
    ('bench/step_time', ['--algorithms=NOPE'], ('--algorithms', 'NOPE', ALGORITHMS)),
    ('bench/step_time', ['--precision=half'], ('--precision', "'half'", 'bfloat16')),
    ('bench/throughput', ['--config.pipeline_stages=2'], ('pipeline_stages', '2', '1')),
    ('bench/throughput', ['--epochs=0'], ('--epochs', '0', '1 or more')),
    ('bench/time_to_accuracy', ['--thresholds=x'], ('--thresholds', "'x'", '0 or more')),
    ('bench/time_to_accuracy', ['--config.dataset=digits'], ('digits', 'thresholds')),
    ('bench/torture', ['--minutes=-1'], ('--minutes', '-1', '0 or more')),
    ('bench/torture', ['--config.batch_size=0'], ('batch_size', '0', '1 or more')),
    ('paper/variance', ['--parts=mixer', '--data_dir=/nowhere'], ('cifar10', '/nowhere')),
    ('paper/variance', ['--draws=1'], ('--draws', '1', '2 or more')),
    ('paper/index', ['--results=/nowhere'], ('--results', '/nowhere', 'a folder')),
    ('paper/reproduce', ['figure6', '--seeds=a'], ('--seeds', "'a'", '0 or more')),
    ('paper/reproduce', ['figure66'], ('figure66', 'figure6,')),
    ('paper/reproduce', [], ('study', 'figure6,')),
])  # fmt: skip
def test_scripts(script, arguments, facts, tmp_path, monkeypatch, capsys):
  if script not in ('prepare_data', 'linear_probe', 'paper/index'):
    arguments = [*arguments, f'--out={tmp_path / "out"}']
  code, out, err = run(monkeypatch, capsys, arguments, f'{script}.py')
  assert (code, out) == (2, '') and told(err, *facts, program=f'{script.rpartition("/")[2]}.py')
  assert not (tmp_path / 'out').exists()


def test_compare_leaves_folders_of_others(tmp_path, monkeypatch, capsys):
  (tmp_path / 'thesis.tex').write_text('x')
  code, _, err = run(monkeypatch, capsys, ['--algorithms=BP', f'--out={tmp_path}'], 'compare.py')
  assert (code, err) == (
    2,
    f'compare.py: {tmp_path} exists and is not the folder of a comparison; '
    'name another with --out\n',
  )

"""Settings for all tests and the programs that they start, made before jax is imported anywhere."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import sys
import tempfile

import pytest

# Eight virtual devices: sharding is tested as on a pod.
flags = ['--xla_force_host_platform_device_count=8']
# The tests compile thousands of small programs and run each once: quick compilation matters, not
# quick code. These two flags halve its time. XLA ends a program that gives it an unknown flag.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  flags += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
os.environ.setdefault('XLA_FLAGS', ' '.join(flags))
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# Tests share what they have compiled, across processes, through a folder. A folder that the user
# names is kept, and makes the next run of the tests faster.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = folder = tempfile.mkdtemp(prefix='lfg_jax-compiled-')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
# Storing a small program takes longer than compiling it.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
# On some CPUs, XLA reports an error for every program in the folder, because LLVM's list of the CPU's
# features has tuning hints that the CPU does not.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# Traces are many small, long-lived objects: garbage collection among them took a sixth of the time.
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope='module')
def what_is_old_is_no_garbage():
  """Excludes what earlier test files left from garbage collections; orbax requests some of them."""
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.fixture(autouse=True)
def quick_compilation_stays():
  """A program under test may switch optimizations on: every later test would compile slowly."""
  config = sys.modules['jax'].config if 'jax' in sys.modules else None
  before = config and config.read('jax_disable_most_optimizations')
  yield
  if config:
    config.update('jax_disable_most_optimizations', before)


def pytest_collection_modifyitems(config, items):
  """Measures coverage in the quick tests only, because it takes a third of a test's time."""
  if config.pluginmanager.hasplugin('_cov'):
    for item in items:
      if item.get_closest_marker('slow'):
        item.add_marker(pytest.mark.no_cover)


def pytest_sessionfinish():
  """Avoids five garbage collections at the end."""
  gc.freeze()

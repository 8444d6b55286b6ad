"""Settings for all tests and the programs that they start, made before jax is imported anywhere."""

import gc
import importlib.metadata
import os
import platform
import sys

import pytest

# Eight virtual devices, also where JAX finds a GPU: sharding is tested as on a pod.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
flags = ['--xla_force_host_platform_device_count=8']
# The tests compile thousands of small programs and run each once: quick compilation matters, not
# quick code. These two flags halve its time. XLA ends a program that gives it an unknown flag.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  flags += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
os.environ.setdefault('XLA_FLAGS', ' '.join(flags))
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# Storing a small program takes longer than compiling it.
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
# On some CPUs, XLA reports an error for every program in the folder, because LLVM's list of the CPU's
# features has tuning hints that the CPU does not.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# Traces are many small, long-lived objects: garbage collection among them took a sixth of the time.
gc.set_threshold(50_000, 20, 100)


def pytest_addoption(parser):
  parser.addoption('--full', action='store_true', help='run all tests, also those marked full')


def pytest_configure(config):
  """Leaves out what is marked full, unless a mark or a test is named.

  Tests share what they have compiled: across processes, and with the next run of the tests.
  `pytest --cache-clear` empties the folder. It is of one computer, because XLA compiles for a CPU.
  """
  options, is_named = config.option, any('::' in argument for argument in config.args)
  if not (options.full or options.markexpr or is_named):
    options.markexpr = 'not full'
  if hasattr(config, 'cache'):
    folder = config.cache.mkdir(f'compiled-{platform.node()}')
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder))


@pytest.fixture(autouse=True, scope='module')
def what_is_old_is_no_garbage():
  """Excludes what earlier test files left from garbage collections; orbax requests some of them."""
  gc.freeze()
  yield
  gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Measures coverage in the quick tests only, because it takes a third of a test's time.

  The mark `no_cover` would not do: in a worker, pytest-cov starts two measurements and stops one.
  """
  if not item.config.pluginmanager.hasplugin('_cov') or not item.get_closest_marker('full'):
    return (yield)
  tracer = sys.gettrace()
  sys.settrace(None)
  try:
    return (yield)
  finally:
    sys.settrace(tracer)


def pytest_sessionfinish():
  """Avoids five garbage collections at the end."""
  gc.freeze()

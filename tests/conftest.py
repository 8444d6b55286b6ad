import os

# Before jax is imported anywhere. Eight virtual devices: sharding is tested as on a pod. The tests compile
# thousands of small programs and run each once: quick compilation matters, not quick code.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import os

# Eight virtual devices, before jax is imported anywhere: sharding is tested as on a pod.
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')

"""Networks with tapped activities.

In reading order: `layers`, `registry`, `mlp`, `resnet`, `sizes`, `mixer`.
"""

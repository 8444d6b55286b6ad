"""What a program costs: times and memory as measured, and traces.

In reading order: `timing`, `profiling`.
"""

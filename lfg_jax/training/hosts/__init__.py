"""Several processes: how they meet, agree and end.

In reading order: `roll_call`, `processes`, `connect`, `preemption`.
"""

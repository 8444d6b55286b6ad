"""Several processes: how they connect, agree and end."""

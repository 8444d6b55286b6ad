"""The fields of a run, and the command line."""

"""The learning rules of the paper's tables, as compositions."""

"""Data sets: where rows come from."""

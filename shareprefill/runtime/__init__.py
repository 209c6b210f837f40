"""The runtime: reads an artifact, and runs the prefill of a model with shared sparse patterns."""

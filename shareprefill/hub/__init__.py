"""Artifacts in repositories of the hub: pushed with a model card, pulled through the loader."""

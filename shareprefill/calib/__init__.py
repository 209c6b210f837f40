"""Calibration: prompts, capture of block-pooled attention maps, and their store."""

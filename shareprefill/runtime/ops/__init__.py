"""Attention operators of the runtime; each folder holds an api, a reference and fast versions.

This package is a leaf: it imports torch, `shareprefill.errors` and, on demand, Triton.
"""

"""Evaluation: what an artifact's policies cost in accuracy, and what they save."""

from __future__ import annotations

"""Regeneration: artifacts made anew from a file that says how, compared with those in use."""

"""Attention block maps as short codes: what a head looks like, whatever the prompt."""

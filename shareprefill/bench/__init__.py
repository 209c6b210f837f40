"""`sp bench`: time to first token and memory, dense against shared sparse attention."""

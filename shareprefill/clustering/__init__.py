"""Clusters of heads with alike attention patterns, and what each head does at run time."""

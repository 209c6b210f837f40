"""A page about one artifact: what its clusters, policies and maps look like, and how sure it is."""

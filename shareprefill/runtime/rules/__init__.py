"""Rules that say which pattern every head of a layer reads: `planned`, and the paper's own."""

"""Self-contained HTML pages with tables and figures."""

"""The routed experts of a mixture: rows grouped by expert."""

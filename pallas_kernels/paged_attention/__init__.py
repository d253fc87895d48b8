"""Grouped-query softmax attention over pages of keys and values."""

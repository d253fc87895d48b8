"""Synthetic tasks with exact answers: `word_problems` (arithmetic) and `recall` (code words).

Problems are made from (seed, split, index) alone, in plain Python: the same three give the same
problem in every process and Python version. Test problems are held out by construction.
"""

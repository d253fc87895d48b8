"""Where parameters come from: released checkpoints, or random numbers for a named preset."""

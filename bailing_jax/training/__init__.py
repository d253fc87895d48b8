"""Training: data, loss, optimizer, the loop, and the checkpoint that comes out."""

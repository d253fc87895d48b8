"""The layers as Flax modules, one idea a file. State goes in and out, it is never a Variable."""

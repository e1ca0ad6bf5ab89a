"""How parameters change in a run."""

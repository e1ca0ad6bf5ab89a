"""A sequence of runs on one task after another (paper section 4.2): what it forgets, and strategies against that."""

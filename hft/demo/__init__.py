"""Data and models that need no Hub."""

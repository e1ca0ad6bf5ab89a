"""Runs side by side with each other and with the paper, as one page."""

"""Half Fine-Tuning (arXiv 2404.18466) on TRL."""

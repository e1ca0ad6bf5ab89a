"""What a sequence does against forgetting: one file per strategy, found by its name."""

"""What a model can do, scored by lm-evaluation-harness; our tasks, and what they measure."""

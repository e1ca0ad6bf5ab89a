"""Scores by lm-evaluation-harness: suites, our tasks and what they measure."""

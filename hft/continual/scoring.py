"""Scores of a model on the tasks of a sequence, by lm-evaluation-harness."""

from __future__ import annotations

"""Run artifacts: manifest, checkpoints, model card, verification."""

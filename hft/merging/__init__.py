"""Models made out of models, without training."""

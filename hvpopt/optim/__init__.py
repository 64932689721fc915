"""Optimizers that take curvature from the training closure."""

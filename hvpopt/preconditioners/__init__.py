"""Preconditioners for conjugate gradients on curvature matrices."""

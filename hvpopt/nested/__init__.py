"""Nested optimization: inner minimisations, and derivatives through them."""

"""Engines: the ways to the products of a training closure, and the choice among them."""

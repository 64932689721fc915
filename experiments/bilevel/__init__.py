"""Bilevel problems: ridge penalties, corrupted labels, step sizes."""

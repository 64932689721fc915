"""Experiments: one folder each, with its claim, its command and the number to expect."""

"""Noise taken out of images: an energy beside a feed-forward network."""

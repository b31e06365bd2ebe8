"""Losses that look at all pairs of a step at once, or remember those before."""

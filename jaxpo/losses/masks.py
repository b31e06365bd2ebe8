"""Losses whose tokens are weighed by masks made of the reference's activations."""

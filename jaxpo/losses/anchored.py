"""Losses that also say where each completion of its own should go."""

"""Losses that compare a completion under two conditions."""

"""Losses that weigh the tokens of a completion, or measure their distributions."""

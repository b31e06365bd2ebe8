"""Losses that weigh or scale each pair by what the models say of it."""

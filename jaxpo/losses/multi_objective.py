"""Losses for several objectives: margins from other rewards, rounds and auxiliary rewards."""

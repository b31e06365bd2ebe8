"""Losses whose margin is shifted or scaled: by scores, by length, by temper."""

"""Many references: what makes one of them, how much each counts, and their log-probabilities on disk."""

"""Scores of a model: what is asked is taken at once, kept as trees of shared prefixes, and run
block by block."""

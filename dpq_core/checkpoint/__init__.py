"""Checkpoints on disk: ours, and other people's formats in both directions."""

"""Quantize one linear layer: statistics of its inputs, grid, column loop, gradient rounding,
storage."""

"""Numbers of few bits: rounding to a format, four-bit codes and their grid, codes in bytes."""

"""A checkpoint as it lies on disk, and whether it is what it seems to be."""

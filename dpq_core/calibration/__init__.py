"""Statistics of the layers' inputs, summed over samples in a fixed order."""

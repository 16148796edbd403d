"""A checkpoint's model: its files and whether they are what they seem to be; its blocks, and which
linears read the same input, found in the model itself and proven on a small instance of it."""

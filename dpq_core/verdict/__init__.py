"""Two models on the same documents: differences, how sure they are, gates."""

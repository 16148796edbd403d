"""One linear layer: what is quantized of it, and how."""

"""Quantized linears where speed counts, a module a kind of device, and the decoding that is
timed."""

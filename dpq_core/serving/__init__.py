"""Quantized linears where speed counts, a module a kind of device, and the decoding that is timed.

`runtimes` is the table and chooses; a module of it has `unavailable`, `refusal` and `make`.
"""

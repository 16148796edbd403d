"""A checkpoint's model: whether its files are what they seem to be; its blocks, and which linears
read the same input, found in the model itself and proven on a small instance of it.

Import from its modules, some of which need no transformers: `reader` and `layout` (tensors and
files), `source`, `quantization`, `fp8`, `context` (what is wrong with them), `streaming` and
`blocks` (a model of which one block is in memory), `kv_cache` (what is put between a model and its
cache), `plan` (what is quantized), `families` (what no model shows).
"""

"""Quantize one linear layer. Read like the paper:

hessian            what calibration leaves of a layer's inputs; `token_weights` in it
correction         the weight moved towards the 16-bit model's outputs
grid               which values the codes stand for; `given`: codes that somebody else chose
column_loop        codes column by column, errors passed on; `column_order`: π
gradient_rounding  codes moved where that lowers the `objective`
quantize           all of it, from a weight to what is stored (`records`, `storage`)
linear             what the stored layer computes
kv_cache           keys and values as an engine keeps them, beside all that
"""

from dpq_core.layer.grid import Grid, choose_grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer, quantize_or_keep
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight, RoundedWeight
from dpq_core.layer.shared_input import SharedInput
from dpq_core.layer.storage import layer_from_tensors, layer_tensors, stored_bytes

__all__ = [
    "Grid",
    "InputStatistics",
    "LayerReport",
    "QuantizedLinear",
    "QuantizedWeight",
    "RoundedWeight",
    "SharedInput",
    "W4A8Linear",
    "choose_grid",
    "layer_from_tensors",
    "layer_tensors",
    "quantize_layer",
    "quantize_or_keep",
    "stored_bytes",
]

"""A scheme as torchao's PT2E quantizer: which tensors of an exported graph get which grid.

The placing (a convolution's input and weight, both sides of an addition, what pooling passes on) is
torchao's X86InductorQuantizer, so that a graph quantized 8/8 per channel is one that oneDNN's
integer kernels compute. The grids are ours: the whitepaper's (section 2 and 3).

    weights      per channel or layer; symmetric −(2ᵇ⁻¹−1) … 2ᵇ⁻¹−1, or affine −2ᵇ⁻¹ … 2ᵇ⁻¹−1
    activations  per layer, affine, 0 … 2ᵇ−1

torchao's fused observer and rounding is not used in training: its scales are not those that its own
conversion then writes, by which a 4-bit network lost points.

Codes of 4 bits are kept in a byte, those of 16 in four: torch has no smaller type for them here.
"""

from typing import Any

import torch
from torch.fx import GraphModule
from torchao.quantization.pt2e.fake_quantize import FakeQuantize
from torchao.quantization.pt2e.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
)
from torchao.quantization.pt2e.quantizer.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    QuantizationConfig,
    X86InductorQuantizer,
)

from dpq_core.convnet.ranges import AVERAGING, observer_of
from dpq_core.convnet.recipe import ActivationScheme, ConvScheme, WeightScheme

_ANNOTATION = "quantization_annotation"
_EPS = 2.0**-24  # smallest scale


class SchemeQuantizer(X86InductorQuantizer):
    """Annotates a graph with a scheme's grids.

    torchao's quantizer takes no other grids than its kernels': it annotates with theirs, and each
    is then replaced by the scheme's, or taken away where the scheme leaves that part alone.
    """

    def __init__(self, scheme: ConvScheme, training: bool) -> None:
        super().__init__()
        inputs = _activations(ActivationScheme(), training)
        weights = _weights(WeightScheme(), training)
        self._wanted: list[tuple[QuantizationSpec, QuantizationSpec | None]] = [
            (inputs, scheme.activations and _activations(scheme.activations, training)),
            (weights, scheme.weights and _weights(scheme.weights, training)),
        ]
        self.set_global(QuantizationConfig(inputs, inputs, weights, None, training))

    def annotate(self, model: GraphModule) -> GraphModule:
        model = super().annotate(model)
        for node in model.graph.nodes:
            if note := node.meta.get(_ANNOTATION):
                theirs = note.input_qspec_map
                note.input_qspec_map = {key: self._ours(spec) for key, spec in theirs.items()}
                note.output_qspec = self._ours(note.output_qspec)
        return model

    def _ours(self, theirs: Any) -> Any:
        for spec, ours in self._wanted:
            if theirs is spec:
                return ours
        inputs = self._wanted[0][1]  # whoever shares a grid shares an activation's
        return theirs if inputs else None


def _activations(scheme: ActivationScheme, training: bool) -> QuantizationSpec:
    levels = {"quant_min": 0, "quant_max": 2**scheme.bits - 1}
    if training:
        constructor = FakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, averaging_constant=AVERAGING, eps=_EPS
        )
    else:
        observer, arguments = observer_of(scheme)
        constructor = observer.with_args(**arguments, eps=_EPS)  # type: ignore[attr-defined]
    return QuantizationSpec(
        dtype=torch.uint8 if scheme.bits <= 8 else torch.int32,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=constructor,
        **levels,
    )


def _weights(scheme: WeightScheme, training: bool) -> QuantizationSpec:
    """In training the range is that of the weights as they are: an average of one."""
    half = 2 ** (scheme.bits - 1)
    channels = scheme.per == "channel"
    if training:
        constructor = FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver
            if channels
            else MovingAverageMinMaxObserver,
            averaging_constant=1.0,
            eps=_EPS,
        )
    else:
        kind = PerChannelMinMaxObserver if channels else MinMaxObserver
        constructor = kind.with_args(eps=_EPS)
    grids = {
        (True, True): torch.per_channel_symmetric,
        (True, False): torch.per_channel_affine,
        (False, False): torch.per_tensor_affine,
    }
    return QuantizationSpec(
        dtype=torch.int8 if scheme.bits <= 8 else torch.int32,
        quant_min=1 - half if scheme.symmetric else -half,
        quant_max=half - 1,
        qscheme=grids[channels, scheme.symmetric],
        ch_axis=0 if channels else None,
        observer_or_fake_quant_ctr=constructor,
    )

"""The Gaudi runtime against a stand-in of the operators: untested on hardware.

The stand-in computes what `dpq_core.serving.gaudi` says of each operator, on the CPU, and refuses
shapes and types that it does not name. It shows that the runtime packs, scales and calls as that
contract asks; that the contract is the vendor's, only a Gaudi can show.
"""

import pytest
import torch

from dpq_core.arithmetic.formats import FORMATS, round_to
from dpq_core.arithmetic.packing import unpack_codes
from dpq_core.errors import InputError
from dpq_core.layer.grid import choose_grid
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import round_weight
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving import gaudi
from dpq_core.serving.runtimes import RUNTIMES

FP8 = torch.float8_e4m3fn


def convert_from_uint4(codes, scales, zeros, dtype):
    assert codes.dtype == zeros.dtype == torch.int32
    assert scales.dtype == torch.bfloat16
    features, out, groups = len(codes), scales.shape[1], len(scales)
    assert codes.shape == (features, out // 8)
    assert zeros.shape == (groups, out // 8)
    size = features // groups
    zero = unpack_codes(zeros, out).float().repeat_interleave(size, 0)
    scale = scales.float().repeat_interleave(size, 0)
    return (scale * (unpack_codes(codes, out).float() - zero)).to(dtype)


def cast_to_fp8_v2(x, scale, stochastic, with_amax, dtype):
    assert not stochastic
    assert not with_amax
    return (x if scale is None else x * scale).to(dtype), x.new_empty(0, dtype=torch.float32)


def fp8_gemm_v2(a, transpose_a, b, transpose_b, d, dtype, scale_a, scale_b, bias, accumulate):
    assert a.dtype == b.dtype == FP8
    assert not transpose_a
    assert not transpose_b
    assert not accumulate
    assert d is None
    assert bias is None
    assert scale_a.shape in ((), (len(a), 1))
    assert scale_b.shape in ((), (b.shape[1],))
    return (a.float() @ b.float() * scale_a * scale_b).to(dtype)


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    if gaudi._hpu() is not None:
        pytest.skip("habana_frameworks is here: its operators are not to be replaced")
    library = torch.library.Library("hpu", "FRAGMENT")
    for function, schema in (
        (convert_from_uint4, "(Tensor c, Tensor s, Tensor? z, ScalarType t) -> Tensor"),
        (
            cast_to_fp8_v2,
            "(Tensor x, Tensor? s, bool r, bool a, ScalarType? t) -> (Tensor, Tensor)",
        ),
        (
            fp8_gemm_v2,
            "(Tensor a, bool ta, Tensor b, bool tb, Tensor? d, ScalarType t, Tensor? sa, "
            "Tensor? sb, Tensor? bias, bool accumulate) -> Tensor",
        ),
    ):
        library.define(function.__name__ + schema)
        library.impl(function.__name__, function, "CPU")
    yield
    library._destroy()


def layer(rows=24, features=256, **changes):
    fields = {"method": "rtn", "rounding": "nearest", "fp8_max": 240, "group_size": 32}
    scheme = Scheme(**fields | changes)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, features, generator=generator) / 20
    scale = torch.tensor(0.013) if scheme.activations == "static" else None
    if scheme.method == "none":
        stored = weight.bfloat16()
    elif scheme.bits == 8:
        stored = round_weight(weight, scheme)
    else:
        codes = torch.randint(16, (rows, features), generator=generator, dtype=torch.uint8)
        stored = QuantizedWeight(codes, choose_grid(weight, scheme, None))
    return QuantizedLinear(scheme, stored, scale, LayerReport(0.0, 0.0, 0))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activations": "dynamic", "symmetric": True},
        {"preset": "gaudi-inc"},
        {"fp8_max": 448},
        {"bits": 8},
        {"bits": 8, "activations": "dynamic"},
        {"inner": "none", "activations": "none"},
    ],
    ids=str,
)
def test_the_operators_are_called_for_the_formula(changes, with_bias):
    one = layer(**changes)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 256, generator=generator).bfloat16()
    x[0, 0] *= 100  # beyond a static range
    bias = torch.randn(24, generator=generator).bfloat16() if with_bias else None
    reference = W4A8Linear(one, bias)
    y = gaudi.make(one, bias)(x)
    assert y.shape == (2, 5, 24)
    assert y.dtype == torch.bfloat16
    precise = W4A8Linear(one, bias).double()(x.double()) if one.scheme.inner == "none" else None
    if precise is None:
        sx = reference._input_scale(x)
        x8 = round_to(x.float() / sx, reference.inner).double()
        precise = x8 @ reference.weight8.double().T * reference.channel_scale.double() * sx
        precise = precise if bias is None else precise + bias.double()
    defined = reference(x.requires_grad_()).detach()  # in plain torch
    error, allowed = ((z.double() - precise).abs().amax() for z in (y, defined))
    assert error <= 2 * allowed


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "none"}, "16-bit weights"),
        ({"inner": "int8"}, "no INT8 operator"),
        ({"activations": "none"}, "E4M3 weights, but 16-bit activations"),
        ({"rows": 20}, "20 output rows: the operator takes multiples of 8"),
        ({"features": 250}, "250 columns are no multiple of group_size 32"),
    ],
    ids=str,
)
def test_what_it_does_not_compute_is_refused(changes, said):
    one = layer(**changes)
    assert gaudi.refusal(one).startswith(said)
    with pytest.raises(InputError, match=said):
        gaudi.make(one, None)


def test_codes_beyond_the_maximum_are_refused():
    one = layer()
    one.weight.grid.group_scale[3, 1] = 40
    assert "beyond fp8_max" in gaudi.refusal(one)
    assert one.weight.grid.decode8(one.weight.codes).max() <= FORMATS["e4m3_240"].maximum


def test_gaudi_2_refuses_what_ends_at_448(monkeypatch):
    monkeypatch.setattr(gaudi, "_is_gaudi2", lambda: True)
    assert gaudi.refusal(layer(fp8_max=448)).startswith("fp8_max is 448, and Gaudi 2 ends at 240")
    assert not gaudi.refusal(layer())


def test_it_says_that_no_hardware_has_seen_it():
    assert gaudi.unavailable().startswith("habana_frameworks is not installed")
    assert RUNTIMES["gaudi"].note == "not tested on hardware"

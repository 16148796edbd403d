"""One arithmetic for BF16 operands on a machine, and the same numbers whichever it is."""

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from product_cases import check_attention, check_eight_bits, check_hessian, check_linear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.kernels import products, sixteen_bit

SEEDS, SIZES = st.integers(0, 1 << 16), st.integers(1, 90)
BOTH = pytest.mark.parametrize("units", [True, False], ids=["BF16 units", "FP32"])
_FEATURES = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+movbe,+sse4.1,+sse4.2,+ssse3,+sse3"
CLASSES = {  # what a processor of a class would have, as far as its libraries can be told
    "AVX2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": _FEATURES,
    },
    "AVX-512 without BF16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "AVX-512 with BF16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
    },
}


@pytest.fixture
def told(monkeypatch):
    """Sets what the processor has and what the libraries are told."""

    def tell(features, **variables):
        for name in products.LIMITS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(products, "features", lambda: features)
        products._chosen.cache_clear()

    yield tell
    monkeypatch.undo()
    products._chosen.cache_clear()


@pytest.mark.parametrize(
    ("features", "variables", "units"),
    [
        (("avx2", "fma3"), {}, False),
        (("avx2", "avx512_f", "avx512_vnni"), {}, False),
        (("avx512_f", "avx512_bf16"), {}, True),
        (("avx512_bf16", "amx_bf16"), {}, True),
        (("neon",), {}, False),
        (("neon", "bf16"), {}, True),
        ((), {}, False),
        (("amx_bf16",), {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (("amx_bf16",), {"ONEDNN_MAX_CPU_ISA": "avx512_core_amx"}, True),
        (("amx_bf16",), {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, False),
        (("amx_bf16",), {"ONEDNN_MAX_CPU_ISA": "DEFAULT", "MKL_ENABLE_INSTRUCTIONS": "AVX"}, False),
        (("avx2",), {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),  # forced: the libraries' way
    ],
    ids=str,
)
def test_the_processor_decides_unless_the_libraries_are_told(told, features, variables, units):
    told(features, **variables)
    assert products.bf16_units() is units
    said = products.described()
    assert f"{'BF16' if units else 'FP32'} products" in said
    assert all(word in said for word in (*features, *(f"{n}={v}" for n, v in variables.items())))


@pytest.mark.parametrize("without", ["avx512_bf16", "libraries", "numba", None])
@pytest.mark.parametrize("wider", [(), ("amx_bf16",)], ids=["", "AMX"])
def test_kernels_of_our_own_use_units_where_the_processor_and_everybody_says_so(
    without, wider, monkeypatch
):
    """In panels where MKL does not: AMX is Intel's."""
    units = () if without == "avx512_bf16" else ("avx512_bf16",)
    monkeypatch.setattr(products, "features", lambda: ("avx2", "fma3", *units, *wider))
    monkeypatch.setattr(products, "bf16_units", lambda: without != "libraries")
    monkeypatch.setattr(numba.config, "CPU_NAME", "haswell" if without == "numba" else None)
    assert products.by_vectors() is (without is None)
    assert products.in_panels() is (without is None and not wider)


@BOTH
@given(seed=SEEDS, tokens=SIZES, features=SIZES, out=SIZES, with_bias=st.booleans())
@settings(deadline=None, max_examples=30)
def test_a_linear_is_the_definition_but_for_the_order_of_sums(
    units, seed, tokens, features, out, with_bias
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "bf16_units", lambda: units)
        check_linear(seed, tokens, features, out, with_bias)


@BOTH
@given(seed=SEEDS, tokens=SIZES, features=SIZES, out=SIZES)
@settings(deadline=None, max_examples=30)
def test_eight_bit_operands_and_hessians_too(units, seed, tokens, features, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "bf16_units", lambda: units)
        check_eight_bits(seed, tokens, features, out)
        check_hessian(seed, tokens, features)


@BOTH
@given(seed=SEEDS, length=st.integers(1, 40), one=st.booleans(), masked=st.booleans())
@settings(deadline=None, max_examples=30)
def test_attention_too(units, seed, length, one, masked):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "bf16_units", lambda: units)
        check_attention(seed, length, 1 if one else length, masked)


@pytest.mark.parametrize("emulated", CLASSES)
def test_libraries_that_are_told_of_another_processor_give_the_same(emulated):
    if "AVX-512" in emulated and "avx512_f" not in products.features():
        pytest.skip("the processor has no AVX-512 to leave parts of out")
    if emulated == "AVX-512 with BF16" and "avx512_bf16" not in products.features():
        pytest.skip("the processor has no BF16 units")
    process = subprocess.run(
        [sys.executable, Path(__file__).with_name("product_cases.py")],
        env={**os.environ, **CLASSES[emulated]},
        capture_output=True,
        text=True,
    )
    assert process.stdout.splitlines()[-1:] == ["as defined"], process.stderr
    expected = "BF16 products" if emulated == "AVX-512 with BF16" else "FP32 products"
    assert expected in process.stdout


def test_a_model_is_fitted_in_its_linears_head_and_attention(monkeypatch):
    monkeypatch.setattr(products, "bf16_units", lambda: False)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**small, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(config).bfloat16().eval()
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        exact = model.double()(input_ids=tokens).logits
        model.bfloat16()
        before = model(input_ids=tokens).logits
        assert sixteen_bit.fit(model) is model
        monkeypatch.setattr(nn.functional, "linear", None)  # nobody else's
        found = model(input_ids=tokens).logits
    assert (found - exact).norm() <= 1.2 * (before - exact).norm()
    assert model.config._attn_implementation == "sdpa_fp32"
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {sixteen_bit.Linear}


def test_gradients_are_those_of_a_linear(monkeypatch):
    monkeypatch.setattr(products, "bf16_units", lambda: False)
    x, weight, bias = (torch.randn(*s).bfloat16().requires_grad_() for s in ((3, 8), (5, 8), (5,)))
    sixteen_bit.linear(x, weight, bias).float().square().sum().backward()
    found = [each.grad for each in (x, weight, bias)]
    wide = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    nn.functional.linear(*wide).square().sum().backward()
    for each, expected in zip(found, wide, strict=True):
        assert (each - expected.grad).abs().max() <= 2**-6 * expected.grad.abs().max()

"""Layers corrected towards the 16-bit model's outputs: the closed form, what it is made of, and
models that are quantized so."""

import json
import re

import pytest
import torch
from architectures import ARCHITECTURES
from architectures import random_model as random_architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import save

from dpq_core.calibration.statistics import Step, TokenWeights, calibrate_block
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_layer, load_model, save_layer
from dpq_core.kernels import products
from dpq_core.layer import shared_input
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer, quantize_or_keep
from dpq_core.layer.shared_input import SharedInput
from dpq_core.model.experts import Given
from dpq_core.model.inputs import batches_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

FEATURES, OUTPUTS, TOKENS = 24, 10, 400
SCHEME = Scheme(group_size=24, rounding="nearest")


def calibration(**changes):
    changes = {"min_tokens_per_input": 0, "propagation": "groups", "correction": 0.5} | changes
    return CalibrationSection(dataset=TextDataset(path="none"), batch_size=2, **changes)


def pair(seed, tokens=TOKENS, features=FEATURES):
    """x16 and what a quantized model gives in its place, correlated features, fp32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    x16 = torch.randn(tokens, features, generator=generator) @ mixing
    shift = torch.randn(features, features, generator=generator) / features
    lost = x16 @ shift + 0.1 * torch.randn(tokens, features, generator=generator)
    return x16, x16 + 0.3 * lost


def counted(x16, x, parts=1):
    """Statistics of inputs x, in so many parts that are added."""
    found = InputStatistics.empty(x.shape[1], shifted=True)
    for their, own in zip(x16.chunk(parts), x.chunk(parts), strict=True):
        one = InputStatistics.empty(x.shape[1], shifted=True)
        one.add_hessian(own)
        one.add_shift(their - own, own)
        one.add_magnitudes(own)
        found.add(one)
    return found


def weight(seed=0, outputs=OUTPUTS, features=FEATURES):
    return torch.randn(outputs, features, generator=torch.Generator().manual_seed(seed))


# The closed form


@given(seed=st.integers(0, 1 << 16), damp=st.sampled_from([1e-3, 0.01, 0.1]))
@settings(deadline=None, max_examples=25)
def test_the_corrected_weight_has_the_least_damped_output_error(seed, damp):
    """Least squares in float64: the rows of both models' inputs, and the damping's below them."""
    (x16, x), w = pair(seed), weight(seed)
    recovered, taken = SharedInput(counted(x16, x)).recovery(damp)
    assert taken == damp
    found = w + w @ recovered
    hessian = 2 * x.double().T @ x.double() / len(x)
    ridge = (damp * hessian.diagonal().mean()).sqrt() * torch.eye(FEATURES, dtype=torch.float64)
    scale = (2 / len(x)) ** 0.5
    rows = torch.cat([scale * x.double(), ridge])
    wanted = torch.cat([scale * x16.double() @ w.double().T, ridge @ w.double().T])
    best = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(found.double(), best, rtol=2e-3, atol=2e-3 * float(best.abs().max()))


@given(seed=st.integers(0, 1 << 16), share=st.floats(0.05, 1))
@settings(deadline=None, max_examples=25)
def test_any_share_comes_nearer_to_the_outputs_than_none_and_less_near_than_all(seed, share):
    (x16, x), w = pair(seed), weight(seed)
    recovered, _ = SharedInput(counted(x16, x)).recovery(1e-4)

    def lost(part):
        residual = x16.double() @ w.double().T - x.double() @ (w + part * w @ recovered).double().T
        return float(residual.square().sum())

    assert lost(1.0) <= lost(share) * 1.0001
    assert lost(share) < lost(0.0)


def test_inputs_that_lack_nothing_correct_nothing():
    x16, _ = pair(0)
    recovered, _ = SharedInput(counted(x16, x16)).recovery(0.01)
    assert torch.equal(recovered, torch.zeros(FEATURES, FEATURES))


@pytest.mark.parametrize("parts", [2, 5])
def test_the_shift_is_the_mean_of_its_tokens_however_they_are_added(parts):
    x16, x = pair(1)
    exact = 2 * (x16 - x).double().T @ x.double()
    found = counted(x16, x, parts)
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.shift_sum.double(), exact, rtol=1e-4, atol=1e-5 * scale)
    again = InputStatistics.from_tensors(found.tensors()).to("cpu")
    assert torch.equal(again.shift_sum, found.shift_sum)
    assert "shift_sum" not in InputStatistics.empty(4).tensors()


@pytest.mark.parametrize("units", [True, False])
def test_the_shift_of_bf16_inputs_in_units_of_a_scale(units, monkeypatch):
    monkeypatch.setattr(products, "bf16_units", lambda: units)
    x16, x = pair(2)
    codes, scale = (x * 8).round().bfloat16(), torch.tensor(0.125)
    away = x16 - codes.float() * scale
    found = InputStatistics.empty(FEATURES, shifted=True)
    found.add_shift(away, codes, scale)
    exact = 2 * away.double().T @ (codes.double() * 0.125)
    error = (found.shift_sum.double() - exact).norm() / exact.norm()
    assert error < 0.005  # of BF16 operands


# One layer


@pytest.mark.parametrize(
    "changes", [{}, {"order": "gar"}, {"method": "rtn"}, {"bits": 8}, {"symmetric": True}], ids=str
)
def test_what_is_quantized_is_the_weight_and_a_share_of_the_change(changes):
    scheme = Scheme(**{"group_size": 8, "activations": "dynamic"} | changes)
    (x16, x), w = pair(3), weight(3)
    found = quantize_layer(w, counted(x16, x), scheme, 0.5)
    recovered, _ = SharedInput(counted(x16, x)).recovery(scheme.damp_frac)
    target = w + (w @ recovered) * 0.5
    expected = quantize_layer(target, counted(x16, x), scheme)
    assert torch.equal(found.decoded(), expected.decoded())
    assert found.report.error == expected.report.error
    change, hessian = (target - w).double(), counted(x16, x).hessian().double()
    moved = ((change @ hessian) * change).sum() / ((target.double() @ hessian) * target).sum()
    assert found.report.corrected == pytest.approx(float(moved), rel=1e-3)


def test_layers_of_one_input_have_the_bytes_that_they_have_alone():
    scheme = Scheme(group_size=8, activations="dynamic")
    schemes = [scheme, scheme.model_copy(update={"order": "none"}), Scheme(bits=8), scheme]
    shared = SharedInput(counted(*pair(4)))
    for seed, each in enumerate(schemes):
        together = quantize_or_keep(weight(seed), shared, each, 1.0, 0.5)
        alone = quantize_or_keep(weight(seed), SharedInput(counted(*pair(4))), each, 1.0, 0.5)
        assert torch.equal(together.decoded(), alone.decoded())
        assert together.report == alone.report


def test_a_layer_that_stays_in_16_bits_is_what_it_was():
    few = quantize_or_keep(weight().bfloat16(), SharedInput(counted(*pair(5, 10))), SCHEME, 1, 0.5)
    assert few.report.kept
    assert torch.equal(few.weight, weight().bfloat16())
    assert few.report.corrected == 0


def test_a_report_says_what_a_correction_did_and_nothing_without_one(tmp_path):
    for share in (0.0, 0.5):
        layer = quantize_layer(weight(), counted(*pair(6)), SCHEME, share)
        folder = tmp_path / str(share)
        folder.mkdir()
        save_layer(folder, layer)
        assert load_layer(folder).report == layer.report
        stored = json.loads((folder / "layer.json").read_text())["report"]
        assert ("corrected" in stored) == (share > 0) == (layer.report.corrected > 0)


def test_damping_grows_tenfold_and_is_reported():
    """As the column loop's does; then the layer ends as it ends there."""
    statistics = counted(*pair(7))
    first, second = torch.linalg.eigh(statistics.hessian_sum)
    first[0] = -0.05 * first.mean()  # as rounding may leave it, and worse
    statistics.hessian_sum = (second * first) @ second.T
    layer = quantize_layer(weight(), statistics, SCHEME, 0.5)
    assert layer.report.damp_frac == pytest.approx(0.1)
    first[0] = -12 * first.mean()
    statistics.hessian_sum = (second * first) @ second.T
    with pytest.raises(ValueError, match="not positive definite with damping 10 of its mean"):
        quantize_layer(weight(), statistics, SCHEME, 0.5)


def test_what_is_not_finite_or_was_not_seen():
    statistics = counted(*pair(8))
    statistics.shift_sum[3, 4] = float("inf")
    with pytest.raises(ValueError, match="what the 16-bit model gives the layer is not finite"):
        quantize_layer(weight(), statistics, SCHEME, 0.5)
    statistics.shift_sum = None
    with pytest.raises(ValueError, match="did not see what the 16-bit model gives the layer"):
        quantize_layer(weight(), statistics, SCHEME, 0.5)
    assert quantize_layer(weight(), statistics, SCHEME).report.corrected == 0


def test_one_factor_more_for_all_layers_of_an_input(monkeypatch):
    asked, make = [], shared_input.inverse_factor
    monkeypatch.setattr(shared_input, "inverse_factor", lambda h, d: asked.append(d) or make(h, d))
    shared = SharedInput(counted(*pair(9)))
    for seed in range(3):
        quantize_or_keep(weight(seed), shared, SCHEME, 1.0, 0.5)
    assert len(asked) == 2


# Tokens of two models


def test_an_expert_s_tokens_are_those_of_both_models():
    x = torch.arange(4.0)[:, None].expand(4, 3)
    mine = Given(x, torch.tensor([1, 4, 5, 9]))
    theirs = Given(x + 10, torch.tensor([0, 4, 9, 11]))
    assert mine.as_given(theirs, "an expert")[:, 0].tolist() == [0, 11, 2, 12]
    none = Given(x[:0], torch.tensor([], dtype=torch.int64))
    assert torch.equal(mine.as_given(none, "an expert"), x)
    assert torch.equal(mine.as_given(None, "an expert"), x)


@pytest.mark.parametrize("other", [None, (5, 3)])
def test_tokens_that_nobody_can_tell_apart_are_refused(other):
    theirs = None if other is None else Given(torch.zeros(other), None)
    said = r"router\.x: .* inputs \[4, 3\].* leave calibration\.correction out"
    with pytest.raises(ValueError, match=said):
        Given(torch.zeros(4, 3), None).as_given(theirs, "router.x")


@pytest.fixture
def by_libraries():
    """The models are compared, to the last bit, with transformers' own."""
    with products.by_libraries():
        yield


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(1))


def test_what_experts_of_two_models_are_given_is_paired_by_token(windows, tmp_path):
    """By hand, from what goes into the experts of both blocks and where their routers send it."""
    base = save("mixtral", tmp_path)
    stream = StreamedModel(base)
    attention = stream.steps(0)[0][0]
    rtn, layers = Scheme(group_size=24, method="rtn", activations="dynamic"), {}
    for name in attention:
        inputs = InputStatistics.empty(64)
        inputs.add_hessian(torch.eye(64))
        layers[name] = quantize_layer(stream.reader.tensor(f"{name}.weight"), inputs, rtn)
    names = tuple(group[0] for group in stream.steps(0)[2])
    assert len(names) == 4
    batches, step = stream.begin(batches_of(windows, 2)), Step(names, layers, beside=True)
    found = calibrate_block(stream, 0, batches, None, TokenWeights(False, 0), False, step, batches)
    seen = [routed(stream, batches, replaced) for replaced in (layers, {})]
    moved = 0
    for number, name in enumerate(names):
        expected, tokens = torch.zeros(64, 64, dtype=torch.float64), 0
        for (x, chosen), (x16, their) in zip(*seen, strict=True):
            mine = (chosen == number).any(1)
            both = mine & (their == number).any(1)
            moved += int(mine.sum() - both.sum())
            tokens += int(mine.sum())
            expected += 2 * (x16 - x)[both].double().T @ x[both].double()
        assert found[name].tokens == tokens
        error = (found[name].shift_sum.double() - expected).norm() / expected.norm()
        assert error < 0.01
    assert moved > 0  # the routers differ, or nothing was tried


@torch.no_grad()
def routed(stream, batches, layers):
    """Of each batch: what goes into the experts of the first block, [tokens, in], and to whom."""
    seen = []
    with stream.block(0, layers) as block:
        experts = block.mlp.experts
        experts.register_forward_pre_hook(lambda _, given: seen.append((given[0], given[1])))
        for batch in batches:
            stream.forward(batch)
    return [(x.float().reshape(-1, x.shape[-1]), chosen) for x, chosen in seen]


MEMBERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_a_layer_is_fed_by_all_that_is_quantized_before_it(by_libraries, windows, tmp_path):
    """The whole model observed, its linears replaced one group after the other, and the 16-bit
    model beside it."""
    base, out = save("llama-2", tmp_path), tmp_path / "out"
    quantize_checkpoint(base, out, windows, SCHEME, calibration(), {})
    checkpoint, model, original = QuantizedCheckpoint(out), load_model(base), load_model(base)
    for group in StreamedModel(base).steps(0) + StreamedModel(base).steps(1):
        ((first, *rest),) = group
        x16, x = (inputs_of(each, first, windows) for each in (original, model))
        statistics = statistics_by_hand(x16, x)
        for name in (first, *rest):
            linear, layer = model.get_submodule(name), checkpoint.layer(name)
            expected = quantize_layer(linear.weight, statistics, SCHEME, 0.5)
            assert torch.equal(layer.input_scale, expected.input_scale)
            changed = layer.weight.codes != expected.weight.codes
            uncorrected = quantize_layer(linear.weight, statistics, SCHEME).weight.codes
            assert (
                changed.float().mean() < 0.01 < (uncorrected != layer.weight.codes).float().mean()
            )
        for name in (first, *rest):
            module = W4A8Linear(checkpoint.layer(name), model.get_submodule(name).bias)
            model.set_submodule(name, module)


@torch.no_grad()
def inputs_of(model, name, windows):
    """[windows, length, in] bf16."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    for batch in windows.split(2):
        model(input_ids=batch)
    handle.remove()
    return torch.cat(seen)


def statistics_by_hand(x16, x):
    statistics = InputStatistics.empty(x.shape[-1], shifted=True)
    statistics.add_magnitudes(x)
    scale = float(x.abs().max()) / 448
    codes = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    norms, first = codes.norm(dim=-1, keepdim=True), (0.125 / 0.875 * (x.shape[1] - 1)) ** 0.5
    weighted, away = (codes / norms).bfloat16(), (x16.float() - codes * scale) / (norms * scale)
    weighted[:, 0] *= first
    away[:, 0] *= first
    for batch in range(0, len(x), 2):
        part = slice(batch, batch + 2)
        statistics.add_hessian(weighted[part])
        statistics.shift_sum += 2 * (
            away[part].bfloat16().float().flatten(0, 1).T @ weighted[part].float().flatten(0, 1)
        )
    return statistics


# Every kind of model


@torch.no_grad()
def logits_of(model, inputs):
    return torch.cat([model(**each).logits.flatten() for each in inputs])


def check_corrected(base, out, inputs):
    """The checkpoint is the model whose linears are replaced one by one."""
    manifest = quantize_checkpoint(base, out, inputs, SCHEME, calibration(), {})
    checkpoint = QuantizedCheckpoint(out)
    checkpoint.verify()
    model, inputs = load_model(base), batches_of(inputs, 2)
    for name in checkpoint.shapes:
        linear = model.get_submodule(name)
        model.set_submodule(name, W4A8Linear(checkpoint.layer(name), linear.bias))
    expected = logits_of(model, inputs)
    assert torch.isfinite(expected).all()
    assert torch.equal(logits_of(load_model(out), inputs), expected)
    assert all(0 < row["corrected"] < 0.5 for row in manifest["layers"] if row["error"])


SHAPED = ["phi3", "gpt_neox", "falcon", "opt", "deepseek_v3"]


@pytest.mark.parametrize("name", SHAPED)
def test_fused_parallel_and_latent(by_libraries, name, windows, tmp_path):
    """Families with experts or images: `test_families.py`."""
    config = next(each.config for each in ARCHITECTURES if each.config.model_type == name)
    base = tmp_path / "base"
    random_architecture(config).to(torch.bfloat16).save_pretrained(base)
    check_corrected(base, tmp_path / "out", windows)


# Settings


@pytest.mark.parametrize("propagation", ["original", "quantized"])
def test_a_correction_wants_two_models(propagation):
    said = re.escape(
        f"correction is 0.5, and propagation: {propagation} does not feed a linear what the"
        " quantized model will: set propagation: groups, or leave correction out"
    )
    with pytest.raises(ValueError, match=said):
        calibration(propagation=propagation)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_nothing_and_all(share):
    with pytest.raises(ValueError, match="correction"):
        calibration(correction=share)


def test_a_recipe_without_a_correction_is_what_it_was():
    assert "correction" not in calibration(correction=0).model_dump(mode="json")
    assert calibration().model_dump(mode="json")["correction"] == 0.5

"""The cost of single layers, against whole models with one layer replaced."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.calibration.statistics import InputRounding, TokenWeights, calibrate_block
from dpq_core.evaluation import head
from dpq_core.kernels.sixteen_bit import fit
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.records import QuantizedLinear
from dpq_core.model.inputs import batches_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import Scheme
from dpq_core.repair import sensitivity
from dpq_core.repair.sensitivity import Trial, block_losses

SCHEME = Scheme(group_size=32, rounding="nearest", order="none")
CHOICES = ("w4a8", "w8a8", "w8a16", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def windows():
    return torch.randint(61, (5, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("block", "rows"), [(0, head.ROWS), (2, head.ROWS), (2, 7)])
def test_losses_are_those_of_whole_models(folder, windows, block, rows, monkeypatch):
    monkeypatch.setattr(head, "ROWS", rows)  # the last: parts of windows of 20 tokens
    stream = StreamedModel(folder)
    batches = stream.begin(batches_of(windows, 2))
    for earlier in range(block):
        with stream.block(earlier):
            stream.advance(batches)
    section = CalibrationSection(dataset=TextDataset(path="none"))
    rounding = InputRounding.of(SCHEME, section)
    before = [batch.hidden.clone() for batch in batches]
    statistics = calibrate_block(
        stream, block, batches, rounding, TokenWeights(False, 0), advance=False
    )
    layers = {}
    for planned in plan_layers(stream, SCHEME).of_block(block):
        weight = stream.reader.tensor(f"{planned.name}.weight")
        for choice in CHOICES:
            scheme = chosen_scheme(SCHEME, choice)
            layers[Trial(planned.name, choice)] = quantize_layer(
                weight, statistics[planned.statistics], scheme
            )
    found = block_losses(
        stream, block, batches, {v: lambda layer=layer: layer for v, layer in layers.items()}
    )
    assert all(torch.equal(b.hidden, h) for b, h in zip(batches, before, strict=True))
    assert list(found) == list(layers)
    for trial, layer in layers.items():
        assert found[trial] == pytest.approx(by_hand(folder, windows, trial, layer), abs=2e-6)
        if trial.choice == "bf16":
            assert found[trial] == 0
    by_choice = {
        choice: sum(loss for trial, loss in found.items() if trial.choice == choice)
        for choice in CHOICES
    }
    assert by_choice["w4a8"] > by_choice["w8a8"] > by_choice["w8a16"] > by_choice["bf16"] == 0


@torch.inference_mode()
def by_hand(folder, windows, trial, layer):
    model = fit(LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
    expected = model(input_ids=windows).logits.double().log_softmax(-1)
    model.set_submodule(trial.name, W4A8Linear(layer, None))
    found = model(input_ids=windows).logits.double().log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


def test_a_large_vocabulary_is_sampled(folder, windows, monkeypatch):
    """To a few percent here, of 61 pieces."""
    stream = StreamedModel(folder, dtype=torch.float32)
    name = "model.layers.1.mlp.down_proj"
    weight = stream.reader.tensor(f"{name}.weight").float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    layer = QuantizedLinear(chosen_scheme(SCHEME, "bf16"), weight + 0.1 * noise, None, None)
    trials = {Trial(name, "changed"): lambda: layer}

    def loss():
        batches = stream.begin(batches_of(windows, 2))
        with stream.block(0):
            stream.advance(batches)
        (found,) = block_losses(stream, 1, batches, trials).values()
        return found

    exact = loss()
    monkeypatch.setattr(sensitivity, "SAMPLED", 40)
    sampled = loss()
    assert sampled != exact
    assert sampled == pytest.approx(exact, rel=0.1)


def test_a_loss_falls_with_the_square_of_the_change(folder, windows):
    """Down to changes that BF16 rounds away or makes as large as any other."""
    stream = StreamedModel(folder, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj"
    weight = stream.reader.tensor(f"{name}.weight").float()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    scheme = chosen_scheme(SCHEME, "bf16")

    def changed(by):
        return lambda: QuantizedLinear(scheme, weight + by * noise, None, None)

    trials = {Trial(name, str(by)): changed(by) for by in (0.04, 0.02, 0.01)}
    losses = block_losses(stream, 0, stream.begin(batches_of(windows, 2)), trials)
    largest, middle, least = losses.values()
    assert largest / middle == pytest.approx(4, rel=0.1)
    assert middle / least == pytest.approx(4, rel=0.1)


def test_predictions_that_are_not_finite_are_no_losses(folder, windows):
    stream = StreamedModel(folder)
    batches = stream.begin(batches_of(windows, 2))
    weight = stream.reader.tensor("model.layers.0.mlp.up_proj.weight")
    statistics = calibrate_block(
        stream,
        0,
        batches,
        InputRounding.of(SCHEME, CalibrationSection(dataset=TextDataset(path="none"))),
        TokenWeights(False, 0),
        advance=False,
    )["model.layers.0.mlp.gate_proj"]
    layer = quantize_layer(weight, statistics, SCHEME)
    batches[1].hidden[1, 3] = torch.nan
    trials = {Trial("model.layers.0.mlp.up_proj", "w4a8"): lambda: layer}
    with pytest.raises(ValueError, match="16-bit model's predictions are not finite"):
        block_losses(stream, 0, batches, trials)

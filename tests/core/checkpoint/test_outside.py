"""Output head and embedding as choices of `layers`: tied and untied, streamed and whole."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma3TextConfig, LlamaConfig

from dpq_core.benchmark.formats_timed import rounded
from dpq_core.calibration.statistics import TokenWeights, calibrate_block
from dpq_core.checkpoint.native import MANIFEST, QuantizedCheckpoint, load_quantized
from dpq_core.evaluation import head as head_module
from dpq_core.evaluation.divergence import divergence
from dpq_core.evaluation.forest import Asked, chunks_of
from dpq_core.evaluation.grain import CPU
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.room import Sizes
from dpq_core.evaluation.scorer import answers, last_states, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.footprint import layer_bytes
from dpq_core.kernels.sixteen_bit import fit
from dpq_core.layer import quantize as quantize_module
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_or_keep
from dpq_core.layer.records import RoundedWeight
from dpq_core.layer.shared_input import SharedInput
from dpq_core.model.inputs import batches_of
from dpq_core.model.plan import PlannedLayer, plan_layers
from dpq_core.model.reader import CheckpointError
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.layer_choices import chosen_scheme
from dpq_core.recipe.scheme import Scheme
from dpq_core.repair.sensitivity import Trial, outside_losses

VOCABULARY = 397
SCHEME = Scheme(group_size=32, rounding="nearest")
SECTION = CalibrationSection(dataset=TextDataset(path="none"), batch_size=2, min_tokens_per_input=0)
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
CONFIGS = {"llama": LlamaConfig, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
TIED = {f"{name}, tied": (name, True) for name in CONFIGS}
KINDS = TIED | {f"{name}, untied": (name, False) for name in CONFIGS}


def config_of(name, tied):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    return CONFIGS[name](**sizes)  # Gemma's embedding is scaled, Gemma 2's logits are capped


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for kind, (name, tied) in KINDS.items():
        torch.manual_seed(0)
        folders[kind] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(config_of(name, tied))
        model.bfloat16().save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))


def quantized(base, folder, windows, choices, scheme=SCHEME, section=SECTION):
    return quantize_checkpoint(base, folder, windows, scheme, section, {}, choices)


def named(kind, choice):
    """Choices for all that is outside the blocks."""
    return dict.fromkeys([EMBEDDING] if KINDS[kind][1] else [HEAD, EMBEDDING], choice)


@torch.no_grad()
def logits_of(model, windows):
    return model(input_ids=windows).logits


def by_hand(base, folder, kind):
    """transformers' model with its parts replaced from the checkpoint's layers."""
    model = fit(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval())
    checkpoint, tied = QuantizedCheckpoint(folder), KINDS[kind][1]
    for name in checkpoint.shapes:
        layer = checkpoint.layer(name)
        if name == EMBEDDING:
            rows = torch.nn.Parameter(layer.decoded().bfloat16(), requires_grad=False)
            model.get_input_embeddings().weight = rows
        if name != EMBEDDING or tied:
            model.set_submodule(HEAD if name == EMBEDDING else name, W4A8Linear(layer, None))
    return model


@pytest.mark.parametrize("choice", ["w4a8", "w8a8", "w8a16", "w8a8-int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_and_streamed_are_the_model_with_its_parts_replaced(
    bases, windows, tmp_path, kind, choice
):
    folder = tmp_path / "checkpoint"
    manifest = quantized(bases[kind], folder, windows, named(kind, choice))
    assert not manifest["skipped"]
    QuantizedCheckpoint(folder).verify()
    expected = logits_of(by_hand(bases[kind], folder, kind), windows)
    assert torch.equal(logits_of(load_quantized(folder), windows), expected)
    stream, layers = StreamedModel(folder), QuantizedCheckpoint(folder)
    stream.outside.quantize(layers.shapes, layers.layer)
    batches = stream.begin(batches_of(windows, 4))
    for index in range(stream.block_count):
        own = {name: layers.layer(name) for name in stream.linears(index)}
        with stream.block(index, own):
            stream.advance(batches)
    assert torch.equal(stream.logits(batches[0].hidden), expected)


def asked_of(windows):
    return [Asked(tuple(row.tolist()), len(row) - 1, n) for n, row in enumerate(windows)]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_scores_are_the_whole_model_s(bases, windows, tmp_path, kind, monkeypatch):
    small = replace(CPU, tile=1 << 12)
    # Ten tokens of a vocabulary of 397.
    monkeypatch.setattr(head_module, "grain_on", lambda device: small)
    scheme = Scheme(method="gptq", inner="none", activations="none", group_size=32)
    folder, asked = tmp_path / "checkpoint", asked_of(windows)
    quantized(bases[kind], folder, windows, named(kind, "w8a16"), scheme)
    subject = subject_of(folder, dtype=torch.float32)
    found = answers(score(subject, list(chunks_of(asked))), len(asked))
    logits = logits_of(load_quantized(folder).float(), windows)[:, :-1].double()
    logs = logits.log_softmax(-1).gather(2, windows[:, 1:, None]).sum((1, 2))
    for (ours, _), theirs in zip(found, logs.tolist(), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)  # the embedding's rows are BF16 in one


@pytest.mark.parametrize("choice", ["w4a8", "w8a8"])
@pytest.mark.parametrize("kind", ["llama, tied", "gemma2, untied"])
def test_a_quantized_head_in_tiles_is_the_head(bases, windows, tmp_path, kind, choice):
    """With static activations, and logits that are capped."""
    quantized(bases[kind], tmp_path / "checkpoint", windows, named(kind, choice))
    stream = subject_of(tmp_path / "checkpoint", dtype=torch.float32).stream
    states = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), head_tiles(stream, columns=100) as tiles:
        parts = [tile for _, tile in tiles.logits(states)]
        whole = stream.logits(states[None])[0]
    assert [part.shape[1] for part in parts] == [100, 100, 100, 97]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_tied_weights_are_stored_once(bases, windows, tmp_path):
    quantized(bases["llama, tied"], tmp_path / "tied", windows, {EMBEDDING: "w4a8"})
    names = QuantizedCheckpoint(tmp_path / "tied").reader.names
    outside = {name for name in names if "layers" not in name}
    parts = ("weight_packed", "group_scale", "zero_point", "channel_scale", "input_scale")
    assert outside == {"model.norm.weight", *(f"{EMBEDDING}.{part}" for part in parts)}


@pytest.mark.parametrize("kind", ["llama, tied", "gemma2, untied"])
def test_the_head_is_calibrated_on_what_it_is_given(bases, windows, kind):
    stream = StreamedModel(bases[kind])
    batches = stream.begin(batches_of(windows, 2))
    for index in range(stream.block_count):
        with stream.block(index):
            stream.advance(batches)
    weights = TokenWeights(False, 0)
    end = stream.block_count
    found = calibrate_block(stream, end, batches, None, weights, advance=True)[HEAD]
    model, given = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.bfloat16), []
    fit(model.eval()).lm_head.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    for part in windows.split(2):
        logits_of(model, part)
    expected = InputStatistics.empty(64)
    for x in given:
        expected.add_hessian(x)
        expected.add_magnitudes(x)
    assert found.tokens == windows.numel()
    torch.testing.assert_close(found.hessian(), expected.hessian())
    assert torch.equal(found.magnitudes, expected.magnitudes)


@pytest.mark.parametrize("fed", [{}, {"propagation": "quantized"}, {"propagation": "groups"}])
def test_compensation_uses_the_head_s_inputs(bases, windows, tmp_path, fed):
    """The whole method has less output error at the head than rounding to nearest."""
    section = SECTION.model_copy(update=fed)
    errors = {}
    for method in ("dpq", "rtn"):
        scheme = SCHEME.model_copy(update={"method": method})
        choices, folder = {HEAD: "w4a8"}, tmp_path / method
        rows = quantized(bases["llama, untied"], folder, windows, choices, scheme, section)
        errors[method] = rows["layers"][-1]["error"]
        assert rows["layers"][-1]["name"] == HEAD
        assert rows["layers"][-1]["tokens"] == windows.numel()
    assert 0 < errors["dpq"] < errors["rtn"]


def test_an_embedding_is_rounded_to_nearest(bases, windows, tmp_path):
    rows = quantized(bases["llama, untied"], tmp_path / "one", windows, {EMBEDDING: "w4a8"})
    assert rows["layers"][0]["name"] == EMBEDDING
    assert rows["skipped"] == {HEAD: "output head, kept in 16 bits"}
    layer = QuantizedCheckpoint(tmp_path / "one").layer(EMBEDDING)
    assert (layer.scheme.method, layer.scheme.activations) == ("rtn", "none")
    weight = StreamedModel(bases["llama, untied"]).reader.tensor(f"{EMBEDDING}.weight").float()
    assert torch.equal(layer.weight.codes, rounded(weight, layer.scheme).weight.codes)
    relative = ((layer.decoded() - weight).square().sum() / weight.square().sum()).item()
    assert rows["layers"][0]["error"] == pytest.approx(relative, rel=1e-4)


def test_without_a_choice_nothing_changes(bases, windows, tmp_path):
    manifest = quantized(bases["llama, tied"], tmp_path / "plain", windows, {})
    assert manifest["skipped"] == {HEAD: "output head, kept in 16 bits"}
    assert all("layers" in row["name"] for row in manifest["layers"])


@pytest.mark.parametrize(
    ("kind", "choices", "scheme", "said"),
    [
        ("llama, tied", {HEAD: "w8a8"}, SCHEME, "lm_head is tied to model.embed_tokens.*name"),
        ("llama, untied", {"head": "w8a8"}, SCHEME, "the model has no linear head"),
        (
            "llama, untied",
            {HEAD: "w4a8", "model.layers.0.mlp.down_proj": "w4a8"},
            Scheme(group_size=80),
            "lm_head: 64 inputs are fewer than group_size 80: give it w8a8 or w8a16",
        ),
    ],
)
def test_what_cannot_be_is_told(bases, kind, choices, scheme, said):
    with pytest.raises(CheckpointError, match=said):
        plan_layers(StreamedModel(bases[kind]), scheme, choices)


def test_a_planted_fault_in_the_head_is_seen(bases, windows, tmp_path):
    """Signed anew, so that no digest tells: the divergence does."""
    kind = "llama, untied"
    quantized(bases[kind], tmp_path / "good", windows, {HEAD: "w8a8"})
    file = next((tmp_path / "good").glob("*.safetensors"))
    chunks, original = list(chunks_of(asked_of(windows))), subject_of(bases[kind])

    def apart():
        candidate = subject_of(tmp_path / "good")
        (theirs,), (ours,) = last_states(original, chunks), last_states(candidate, chunks)
        with head_tiles(original.stream) as a, head_tiles(candidate.stream) as b:
            return divergence(a, theirs.hidden, b, ours.hidden).nats.mean()

    good, tensors = apart(), load_file(file)
    tensors[f"{HEAD}.channel_scale"] = tensors[f"{HEAD}.channel_scale"].roll(1, 0)
    save_file(tensors, file, metadata={"format": "pt"})
    assert apart() > 2 * good


def test_a_head_of_another_shape_is_refused(bases, windows, tmp_path):
    quantized(bases["llama, untied"], tmp_path / "good", windows, {HEAD: "w8a8"})
    path = tmp_path / "good" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["layers"][-1]["shape"] = [VOCABULARY + 1, 64]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is .*, but config.json asks for"):
        load_quantized(tmp_path / "good")


# Large ones, by pieces


@pytest.mark.parametrize("choice", ["w4a8", "w8a8", "bf16"])
@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_pieces_are_the_whole(monkeypatch, choice, correction):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 64, generator=generator).bfloat16()
    statistics = InputStatistics.empty(64, shifted=True)
    x = torch.randn(300, 64, generator=generator)
    statistics.add_hessian(x)
    statistics.add_shift(0.1 * torch.randn(300, 64, generator=generator), x)
    statistics.add_magnitudes(x)
    scheme = chosen_scheme(Scheme(group_size=32), choice)

    def made():
        return quantize_or_keep(weight, SharedInput(statistics), scheme, 0, correction)

    whole = made()
    monkeypatch.setattr(quantize_module, "_MANY", 100)
    monkeypatch.setattr(quantize_module, "_PIECE", 48)
    by_pieces = made()
    assert torch.equal(by_pieces.decoded(), whole.decoded())
    numbers = ("error", "damp_frac", "codes_moved", "tokens", "corrected")
    for name in numbers:
        expected = getattr(whole.report, name)
        assert getattr(by_pieces.report, name) == pytest.approx(expected, rel=1e-5)
    one_for_all = scheme.model_copy(update={"channel_scale": "tensor"})
    assert quantize_module.rows_at_once(200, one_for_all) == 200


def test_the_memory_of_a_large_head_is_bounded():
    """By a piece, its Hessian, and a few bytes a weight: not twenty."""
    scheme = Scheme()
    head = PlannedLayer("lm_head", 18, "lm_head", 262_144, 640, scheme, outside="head")
    assert layer_bytes(head) < 6 * head.weights
    block = PlannedLayer("x", 0, "x", 65_536, 640, scheme)
    assert layer_bytes(block) == 4 * (2 * 640**2 + 5 * block.weights)


def test_a_quantized_head_takes_room_while_it_is_decoded(bases):
    for kind in ("llama, tied", "llama, untied"):
        stream = StreamedModel(bases[kind])
        plain = Sizes.of(stream)
        quantized = Sizes.of(stream, named(kind, "w4a8"))
        assert quantized.bytes_of(100) - plain.bytes_of(100) == 1.5 * VOCABULARY * 64


# What they cost


@pytest.mark.parametrize("kind", ["llama, tied", "gemma2, untied"])
def test_losses_are_those_of_whole_models(bases, windows, kind):
    stream = StreamedModel(bases[kind], dtype=torch.float32)
    names = named(kind, "w8a8")
    planned = {each.name: each for each in plan_layers(stream, SCHEME, names).layers}
    trials = {}
    for name in names:
        for choice in ("w8a16", "bf16"):
            scheme = planned[name].under(SCHEME, choice).scheme
            weight = stream.reader.tensor(f"{name}.weight")
            layer = quantize_or_keep(weight, None, scheme, 0)
            trials[Trial(name, choice)] = layer
    given = {trial: lambda layer=layer: layer for trial, layer in trials.items()}
    found = outside_losses(stream, batches_of(windows, 2), given)
    for trial, layer in trials.items():
        model = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32).eval()
        expected = logits_of(model, windows).double().log_softmax(-1)
        if trial.name == EMBEDDING:
            rows = torch.nn.Parameter(layer.decoded(), requires_grad=False)
            model.get_input_embeddings().weight = rows
        if trial.name == HEAD or KINDS[kind][1]:
            model.set_submodule(HEAD, W4A8Linear(layer, None))
        changed = logits_of(model, windows).double().log_softmax(-1)
        loss = (expected.exp() * (expected - changed)).sum(-1).mean().item()
        assert found[trial] == pytest.approx(loss, abs=1e-7, rel=1e-3)
        assert (found[trial] > 1e-6) == (trial.choice != "bf16")
    assert isinstance(next(iter(trials.values())).weight, RoundedWeight)
    assert not stream.outside.quantized(stream.anatomy.parts.head)  # as it was

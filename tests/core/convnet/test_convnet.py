"""Convolutional classifiers: grids, ranges, fine-tuning, integers, the archive, the gates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from dpq_core.convnet.artifact import (
    MANIFEST,
    MODEL,
    ArtifactError,
    WeightSizes,
    load_classifier,
    load_program,
    read_manifest,
    save_classifier,
    weight_sizes,
)
from dpq_core.convnet.gates import accuracy_change, judge_classifier
from dpq_core.convnet.images import Images, as_input, load_images
from dpq_core.convnet.integers import IntegerClassifier
from dpq_core.convnet.networks import NetworkError, build_network
from dpq_core.convnet.quantize import (
    exported,
    fine_tune,
    post_training,
    train_batch_norm,
    training_graph,
)
from dpq_core.convnet.quantizer import SchemeQuantizer
from dpq_core.convnet.recipe import (
    ActivationScheme,
    CalibrationSection,
    ConvGates,
    ConvScheme,
    ImagesSection,
    NetworkSection,
    QatSection,
    TrainingSection,
    WeightScheme,
)
from dpq_core.convnet.train import fit, predict, score, seeded

pytestmark = pytest.mark.usefixtures("patterns_of_present_convolutions")

ROOT = Path(__file__).parents[3]
TRAINING = TrainingSection(epochs=3, batch_size=32)
CALIBRATION = CalibrationSection(batches=4)
NARROW = {"width": 0.5}
FLOAT = ConvScheme(weights=None, activations=None)
PER_LAYER = WeightScheme(per="layer", symmetric=False)


@pytest.fixture(scope="module")
def images():
    return load_images(ImagesSection(train_samples=800, test_samples=128))


@pytest.fixture(scope="module")
def networks(images):
    """Each kind, trained for a moment."""
    made = {"tiny": tiny()}
    for kind in ("mobilenet", "resnet"):
        with seeded(0) as generator:
            network = build_network(NetworkSection(kind=kind, **NARROW), images.shape, 10).train()
            fit(network, images.train, TRAINING, 3, 0.1, generator)
        made[kind] = network.eval()
    return made


def tiny():
    """One layer of each kind, untrained, in a moment exported."""
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 8, 3, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        ).eval()


@pytest.fixture(scope="module")
def folded(networks, images):
    """Float graphs of both, without batch norm."""
    return {kind: quantized(networks, images, FLOAT, kind) for kind in networks}


def quantized(networks, images, scheme, kind="tiny"):
    return post_training(networks[kind], images.train, scheme, CALIBRATION)


def weight_grids(graph):
    """Codes, scales, zero points, lowest and highest code of each layer."""
    found = []
    for node in graph.graph.nodes:
        if "dequantize" not in str(node.target) or node.args[0].op != "get_attr":
            continue
        read = [
            getattr(graph, a.target) if isinstance(a, torch.fx.Node) else torch.tensor(a)
            for a in node.args[:3]
        ]
        low, high = node.args[-3:-1]
        found.append((*read, low, high))
    return found


@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(bits=bits, per=per, symmetric=symmetric)
        for bits in (4, 8, 16)
        for per, symmetric in (("channel", True), ("channel", False), ("layer", False))
    ],
    ids=lambda scheme: f"{scheme.bits}-{scheme.per}-{scheme.symmetric}",
)
def test_weights_lie_on_the_grid_of_their_scheme(scheme, networks, folded, images):
    graph = quantized(networks, images, ConvScheme(weights=scheme, activations=None))
    grids = weight_grids(graph)
    weights = [p for p in folded["tiny"].parameters() if p.dim() > 1]
    assert len(grids) == len(weights) == 3
    half = 2 ** (scheme.bits - 1)
    for (codes, scales, zeros, low, high), weight in zip(grids, weights, strict=True):
        assert (low, high) == (1 - half if scheme.symmetric else -half, half - 1)
        assert low <= int(codes.min()) < int(codes.max()) <= high
        assert scales.numel() == (len(codes) if scheme.per == "channel" else 1)
        shape = (-1, *[1] * (codes.dim() - 1))
        rounded = (codes.double() - zeros.reshape(shape)) * scales.double().reshape(shape)
        steps = (rounded - weight.double()) / scales.double().reshape(shape)
        assert steps.abs().max() <= (0.5 if scheme.symmetric else 1) + 0.02  # fp32
    assert all(bool((zeros == 0).all()) for _, _, zeros, *_ in grids) == scheme.symmetric


def operations(graph):
    return [str(node.target) for node in graph.graph.nodes]


def test_either_part_can_be_left_in_floating_point(networks, images):
    weights_only = quantized(networks, images, ConvScheme(activations=None))
    assert not any("quantize_per_tensor" in each for each in operations(weights_only))
    assert any("dequantize_per_channel" in each for each in operations(weights_only))
    activations_only = quantized(networks, images, ConvScheme(weights=None))
    assert any("quantize_per_tensor" in each for each in operations(activations_only))
    assert weight_grids(activations_only) == []


@pytest.mark.parametrize("kind", ["mobilenet", "resnet"])
def test_folding_batch_norm_changes_nothing_and_leaves_none(kind, networks, folded, images):
    graph = folded[kind]
    assert not any("batch_norm" in each for each in operations(graph))
    expected = predict(networks[kind], images.test)
    torch.testing.assert_close(predict(graph, images.test), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mobilenet", "resnet"])
def test_integer_kernels_give_what_the_reloaded_graph_gives(kind, networks, images, tmp_path):
    graph = quantized(networks, images, ConvScheme(), kind)
    save_classifier(tmp_path, graph, as_input(images.train.pixels[:2]), {})
    simulated = predict(graph, images.test)
    assert torch.equal(predict(load_classifier(tmp_path), images.test), simulated)
    integers = IntegerClassifier(tmp_path, batch_size=48)  # the last batch is filled up
    logits = predict(integers, images.test)
    assert torch.equal(logits.argmax(1), simulated.argmax(1))
    assert (logits - simulated).abs().mean() < 0.01 * simulated.abs().mean()
    between = [n for n in integers.graph.graph.nodes if "qconv_pointwise" in str(n.target)]
    assert between
    if kind == "mobilenet":  # all but the last convolution hand on bytes
        kinds = [node.args[13] for node in between]
        assert kinds == [torch.uint8] * (len(kinds) - 1) + [torch.float32]
        assert not any("hardtanh" in each for each in operations(integers.graph))


@pytest.mark.parametrize(
    "scheme",
    [ConvScheme(weights=PER_LAYER), ConvScheme(activations=None)],
    ids=["per layer", "weights only"],
)
def test_what_would_run_in_floating_point_is_no_integer_classifier(
    scheme, networks, images, tmp_path
):
    assert not scheme.integer
    graph = quantized(networks, images, scheme)
    save_classifier(tmp_path, graph, as_input(images.train.pixels[:2]), {})
    with pytest.raises(ArtifactError, match="would run in floating point"):
        IntegerClassifier(tmp_path, 8)


RELOAD = """
import sys
blocked = ("prefect", "mlflow", "transformers", "sklearn", "dpq_core.convnet.train",
           "dpq_core.convnet.networks", "dpq_core.convnet.quantize", "dpq_core.convnet.quantizer")
sys.modules.update(dict.fromkeys(blocked))
import torch
from pathlib import Path
from dpq_core.convnet.integers import IntegerClassifier
folder = Path(sys.argv[1])
x, expected = torch.load(folder / "probe.pt")
assert torch.equal(IntegerClassifier(folder, len(x))(x), expected)
print("same")
"""


def test_an_artifact_runs_in_a_process_that_has_no_training_code(networks, images, tmp_path):
    graph = quantized(networks, images, ConvScheme())
    save_classifier(tmp_path, graph, as_input(images.train.pixels[:2]), {})
    x = as_input(images.test.pixels[:8])
    torch.save((x, IntegerClassifier(tmp_path, 8)(x)), tmp_path / "probe.pt")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "same", done.stderr[-1000:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MODEL).write_bytes(b"PK"), "unreadable"),
        (lambda folder: (folder / MANIFEST).unlink(), "not a quantized classifier"),
        (
            lambda folder: (folder / MANIFEST).write_text(json.dumps({"format_version": 9})),
            "format version 9 is unknown",
        ),
    ],
    ids=["archive", "manifest", "version"],
)
def test_a_damaged_artifact_is_refused(damage, message, tmp_path):
    layer = exported(nn.Conv2d(1, 2, 3).eval(), torch.zeros(2, 1, 8, 8))
    save_classifier(tmp_path, layer, torch.zeros(2, 1, 8, 8), {})
    load_classifier(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        load_classifier(tmp_path)


def test_sizes_are_those_of_what_is_stored(networks, folded, images, tmp_path):
    example = as_input(images.train.pixels[:2])
    integers = quantized(networks, images, ConvScheme())
    for name, graph in (("int8", integers), ("float", folded["tiny"])):
        (tmp_path / name).mkdir()
        save_classifier(tmp_path / name, graph, example, {})
    weights = sum(p.numel() for p in networks["tiny"].parameters() if p.dim() > 1)
    sizes = weight_sizes(load_program(tmp_path / "int8"))
    assert (sizes.float_bytes, sizes.stored_bytes) == (4 * weights, weights)
    assert sizes.float_layers == ()
    assert 1 < sizes.ratio_with_grids < sizes.ratio == 4
    assert read_manifest(tmp_path / "int8")["weights"]["ratio"] == 4
    untouched = weight_sizes(load_program(tmp_path / "float"))
    assert (untouched.ratio, len(untouched.float_layers)) == (1, 3)


def test_fine_tuning_recovers_what_four_bits_cost(networks, images):
    kind = "resnet"
    scheme = ConvScheme(
        weights=WeightScheme(bits=4, per="layer", symmetric=False),
        activations=ActivationScheme(bits=4),
    )
    before = {name: value.clone() for name, value in networks[kind].state_dict().items()}
    after = quantized(networks, images, scheme, kind)
    qat = QatSection(epochs=2, learning_rate=0.02)
    with seeded(0) as generator:
        tuned = fine_tune(networks[kind], images.train, scheme, TRAINING, qat, generator)
    losses = [
        nn.functional.cross_entropy(predict(graph, images.test), images.test.labels)
        for graph in (after, tuned)
    ]
    assert losses[1] < losses[0]
    assert operations(tuned).count("aten.conv2d.default") == operations(after).count(
        "aten.conv2d.default"
    )
    assert not any("batch_norm" in each for each in operations(tuned))
    assert all(torch.equal(before[name], v) for name, v in networks[kind].state_dict().items())


def test_an_average_that_never_moves_gives_the_weights_from_before(networks, images):
    few = images.train.first(64)
    still = QatSection(epochs=1, frozen_epochs=1, learning_rate=0.5, average=1 - 1e-12)
    with seeded(0) as generator:
        graph = fine_tune(networks["tiny"], few, ConvScheme(), TRAINING, still, generator)
    plain = quantized(networks, images, ConvScheme())
    found, expected = (
        {grid[0].shape: grid[0].int() for grid in weight_grids(g)} for g in (graph, plain)
    )
    assert found.keys() == expected.keys()
    assert max(int((found[shape] - expected[shape]).abs().max()) for shape in found) <= 1


def test_fine_tuning_that_moves_nothing_gives_the_network(images):
    """In 16 bits, of a network whose batch norm has another constant than torch's."""
    sixteen = ConvScheme(weights=WeightScheme(bits=16), activations=ActivationScheme(bits=16))
    other = tiny()
    for norm in (module for module in other if isinstance(module, nn.BatchNorm2d)):
        norm.eps = 1e-3
        norm.running_var.fill_(2e-3)
    few = images.train.first(256)
    still = QatSection(epochs=1, frozen_epochs=1, learning_rate=1e-9)
    with seeded(0) as generator:
        graph = fine_tune(other, few, sixteen, TRAINING, still, generator)
    expected = predict(other, few)
    off = (predict(graph, few) - expected).abs()  # outliers beyond the first batch's range are cut
    assert off.mean() < 0.05 * expected.abs().mean()


def test_what_is_trained_is_what_is_written(images):
    """The graph in training, once it is frozen, and the one converted from it, at four bits."""
    scheme = ConvScheme(weights=WeightScheme(bits=4), activations=None)
    graph = exported(tiny().train(), as_input(images.train.pixels[:2]))
    prepared = prepare_qat_pt2e(graph, SchemeQuantizer(scheme, training=True))
    x = as_input(images.train.pixels[:64])
    prepared(x)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(1.3)  # ranges follow the weights
    train_batch_norm(prepared, False)
    trained = prepared(x)
    torch.testing.assert_close(convert_pt2e(prepared)(x), trained, rtol=1e-3, atol=1e-4)


def test_frozen_batch_norm_keeps_its_statistics(images):
    with seeded(0):
        network = build_network(NetworkSection(**NARROW), images.shape, 10).train()
    graph = exported(network, as_input(images.train.pixels[:2]))
    x = as_input(images.train.pixels[:16])

    def moved():
        before = {name: b.clone() for name, b in graph.named_buffers() if "running" in name}
        graph(x)
        return any(not torch.equal(before[name], graph.get_buffer(name)) for name in before)

    assert moved()
    train_batch_norm(graph, False)
    assert not moved()


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"model_type": "mobilenet_v1", "depth_multiplier": 0.25}, 32),
        ({"model_type": "mobilenet_v2", "depth_multiplier": 0.35}, 32),
        (
            {
                "model_type": "resnet",
                "layer_type": "basic",
                "embedding_size": 16,
                "hidden_sizes": [16, 32],
                "depths": [1, 1],
            },
            32,
        ),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else "",
)
def test_networks_of_transformers_run_in_integers(config, size, tmp_path):
    pixels = torch.randint(0, 256, (8, 3, size, size), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8)
    pictures = Images(pixels.to(torch.uint8), labels)
    section = NetworkSection(kind="transformers", config=config)
    with seeded(0):
        network = build_network(section, (3, size, size), 8)
    graph = post_training(network, pictures, ConvScheme(), CalibrationSection(batches=1))
    save_classifier(tmp_path, graph, as_input(pixels[:2]), {})
    simulated = predict(graph, pictures)
    integers = predict(IntegerClassifier(tmp_path, 8), pictures)
    assert (integers - simulated).abs().max() <= 0.1 * simulated.abs().max()


@pytest.mark.parametrize(
    ("section", "shape", "message"),
    [
        ({"config": {"model_type": "no-such"}}, (3, 32, 32), "no-such"),
        ({"id": "/nowhere/at-all"}, (3, 32, 32), "/nowhere/at-all"),
    ],
)
def test_a_network_that_cannot_be_built_says_so(section, shape, message):
    with pytest.raises(NetworkError, match=message):
        build_network(NetworkSection(kind="transformers", **section), shape, 10)


def save_program(network, path, example, dynamic):
    shapes = ({0: Dim("batch", min=1, max=64)},) if dynamic else None
    torch.export.save(export(network, (example,), dynamic_shapes=shapes), path)


def test_an_exported_network_is_quantized_as_the_network_itself(networks, images, tmp_path):
    path, example = tmp_path / "net.pt2", as_input(images.train.pixels[:2])
    save_program(networks["tiny"], path, example, dynamic=True)
    opened = build_network(NetworkSection(kind="exported", id=str(path)), images.shape, 10)
    ours, theirs = (
        post_training(network, images.train, ConvScheme(), CALIBRATION)
        for network in (networks["tiny"], opened)
    )
    assert torch.equal(predict(ours, images.test), predict(theirs, images.test))
    ours, theirs = (training_graph(network, example) for network in (networks["tiny"], opened))
    assert torch.equal(ours(example), theirs(example))
    for name in ("1.running_mean", "1.running_var"):  # which have seen the batch
        before, one, other = (graph.get_buffer(name) for graph in (networks["tiny"], ours, theirs))
        assert torch.equal(one, other)
        assert not torch.equal(one, before)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no file: network.id names an archive"),
        (lambda path: path.write_bytes(b"PK"), "unreadable"),
        (lambda path: save_program(tiny(), path, torch.zeros(2, 1, 8, 8), False), "1×8×8"),
    ],
    ids=["missing", "damaged", "fixed batch"],
)
def test_an_archive_that_is_no_network_says_so(write, message, tmp_path):
    path = tmp_path / "net.pt2"
    write(path)
    with pytest.raises(NetworkError, match=message):
        build_network(NetworkSection(kind="exported", id=str(path)), (1, 8, 8), 10)


def scores_of(images, wrong):
    logits = torch.nn.functional.one_hot(images.test.labels, 10).float()
    logits[:wrong] = -logits[:wrong]
    return score(logits, images.test, "digits")


SIZES = WeightSizes(4000, 1000, 80, ())


@pytest.mark.parametrize(
    ("wrong", "sizes", "checks", "reasons"),
    [
        (2, SIZES, {"integers": None}, []),
        (3, SIZES, {"integers": None}, ["accuracy: drop"]),
        (0, WeightSizes(4000, 1300, 80, ("head.weight",)), {}, ["size_ratio: 3.08", "head.weight"]),
        (0, SIZES, {"integers": "other classes"}, ["integrity: integers: other classes"]),
    ],
    ids=["within", "accuracy", "size", "integrity"],
)
def test_gates(wrong, sizes, checks, reasons, images):
    change = accuracy_change(scores_of(images, 0), scores_of(images, wrong))
    verdict = judge_classifier(change, sizes, checks, ConvGates(accuracy_drop=2.0))
    assert verdict.verdict == ("rejected" if reasons else "promoted")
    said = "; ".join(verdict.reasons)
    assert all(reason in said for reason in reasons)
    assert verdict.metrics["accuracy"].turned_wrong == wrong


@pytest.mark.parametrize(("allowed", "expected"), [(False, "inspected"), (True, "promoted")])
def test_some_of_the_images_do_not_promote_unless_the_gates_say_so(allowed, expected, images):
    change = accuracy_change(scores_of(images, 0), scores_of(images, 0))
    gates = ConvGates(allow_limited=allowed)
    verdict = judge_classifier(change, SIZES, {}, gates, limited="images.test_samples")
    assert verdict.verdict == expected
    assert any("images.test_samples left" in reason for reason in verdict.reasons) is not allowed


def test_a_float_network_that_is_not_finite_is_no_verdict(images):
    broken = score(torch.full((len(images.test), 10), torch.nan), images.test, "digits")
    change = accuracy_change(broken, scores_of(images, 0))
    assert judge_classifier(change, SIZES, {}, ConvGates()).verdict == "error"


def test_logits_that_are_not_finite_reject(images):
    logits = torch.zeros(len(images.test), 10)
    logits[5, 3] = torch.nan
    change = accuracy_change(scores_of(images, 0), score(logits, images.test, "digits"))
    verdict = judge_classifier(change, SIZES, {}, ConvGates())
    assert verdict.verdict == "rejected"
    assert "not finite" in verdict.reasons[0]

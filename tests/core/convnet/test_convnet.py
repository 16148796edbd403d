"""Convolutional classifiers: grids, ranges, fine-tuning, files that onnxruntime runs, the gates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from PIL import Image
from torch import nn
from torch.export import Dim, export

from dpq_core.convnet import executor
from dpq_core.convnet.artifact import (
    ArtifactError,
    WeightSizes,
    read_manifest,
    save_classifier,
    weight_sizes,
)
from dpq_core.convnet.executor import Classifier, kernel_counts
from dpq_core.convnet.files import MANIFEST, MODEL
from dpq_core.convnet.gates import (
    accuracy_change,
    chance_warning,
    float_checks,
    judge_classifier,
)
from dpq_core.convnet.graph import layers_of, prepared
from dpq_core.convnet.grids import Codes, WeightRounding, rounded
from dpq_core.convnet.images import Images, load_images
from dpq_core.convnet.networks import NetworkError, build_network
from dpq_core.convnet.noise import signal_to_noise, worst
from dpq_core.convnet.quantize import (
    fine_tune,
    freeze_batch_norm,
    post_training,
    rounding_graph,
)
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


def weight_grids(path):
    """Codes, scales, zero points of each layer of a file."""
    graph = onnx.load(path).graph
    tensors = {each.name: each for each in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    found = []
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and node.input[1] in makers:
            names = makers[node.input[1]].input
            kind = tensors[names[0]].data_type
            found.append((kind, *(numpy_helper.to_array(tensors[name]) for name in names)))
    return found


KINDS = {4: TensorProto.INT4, 8: TensorProto.INT8, 16: TensorProto.INT16}


@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(bits=bits, per=per, symmetric=symmetric, rounding="nearest")
        for bits in (4, 8, 16)
        for per, symmetric in (("channel", True), ("channel", False), ("layer", False))
    ]
    + [WeightScheme(reduce_range=True)],
    ids=lambda s: f"{s.bits}-{s.per}-{s.symmetric}{'-reduced' if s.reduce_range else ''}",
)
def test_weights_lie_on_the_grid_of_their_scheme(scheme, networks, folded, images, tmp_path):
    made = quantized(networks, images, ConvScheme(weights=scheme, activations=None))
    saved(tmp_path, made, images)
    grids = weight_grids(tmp_path / MODEL)
    weights = [layer.weight for layer in folded["tiny"].layers.values()]
    assert len(grids) == len(weights) == 3
    half = 2 ** (scheme.bits - 1 - bool(scheme.reduce_range))
    low, high = 1 - half if scheme.symmetric else -half, half - 1
    assert all((zeros == 0).all() for *_, zeros in grids) == scheme.symmetric
    for (kind, codes, scales, zeros), weight in zip(grids, weights, strict=True):
        assert kind == KINDS[scheme.bits]
        codes, zeros = torch.tensor(codes.astype(int)), torch.tensor(zeros.astype(int))
        scales = torch.tensor(scales)
        assert low <= int(codes.min()) < int(codes.max()) <= high
        assert scales.numel() == (len(codes) if scheme.per == "channel" else 1)
        shape = (-1, *[1] * (codes.dim() - 1))
        rounded = (codes.double() - zeros.reshape(shape)) * scales.double().reshape(shape)
        steps = (rounded - weight.double()) / scales.double().reshape(shape)
        assert steps.abs().max() <= (0.5 if scheme.symmetric else 1) + 0.02  # fp32


def saved(folder, made, images):
    save_classifier(folder, made, images.train.inputs(slice(2)), {})
    return folder


def operations(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def test_either_part_can_be_left_in_floating_point(networks, images, tmp_path):
    made = quantized(networks, images, ConvScheme(activations=None))
    weights_only = operations(saved(tmp_path, made, images) / MODEL)
    assert weights_only.count("DequantizeLinear") == 3
    assert "QuantizeLinear" not in weights_only
    made = quantized(networks, images, ConvScheme(weights=None))
    assert weight_grids(saved(tmp_path, made, images) / MODEL) == []
    assert "QuantizeLinear" in operations(tmp_path / MODEL)


@pytest.mark.parametrize("kind", ["mobilenet", "resnet"])
def test_folding_batch_norm_changes_nothing_and_leaves_none(kind, networks, folded, images):
    made = folded[kind]
    assert all(layer.norm is None for layer in made.layers.values())
    assert not any("batch_norm" in str(node.target) for node in made.graph.graph.nodes)
    expected = predict(networks[kind], images.test)
    torch.testing.assert_close(predict(made.graph, images.test), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mobilenet", "resnet"])
def test_the_file_runs_in_integers_and_gives_what_the_graph_gives(kind, networks, images, tmp_path):
    made = quantized(networks, images, ConvScheme(), kind)
    saved(tmp_path, made, images)
    simulated = predict(made.graph, images.test)
    written = predict(Classifier(tmp_path, "as written"), images.test)
    integers = predict(Classifier(tmp_path), images.test)
    for logits in (written, integers):
        assert (logits.argmax(1) != simulated.argmax(1)).sum() <= 1
        assert (logits - simulated).abs().mean() < 0.02 * simulated.abs().mean()
    assert kernel_counts(tmp_path) == {"integer": len(made.layers), "float": 0}


def test_what_runs_is_counted_where_it_runs(networks, images, tmp_path):
    schemes = {
        "weights only": ConvScheme(activations=None),
        "activations only": ConvScheme(
            weights=None
        ),  # as the file says, and not as onnxruntime likes
        "sixteen bits": ConvScheme(activations=ActivationScheme(bits=16)),
        "per layer": ConvScheme(weights=PER_LAYER),
    }
    found = {}
    for name, scheme in schemes.items():
        saved(tmp_path, quantized(networks, images, scheme), images)
        found[name] = kernel_counts(tmp_path)
    simulated = {"integer": 0, "float": 3}
    assert found["weights only"] == found["sixteen bits"] == simulated
    assert found["activations only"] == simulated
    assert found["per layer"]["integer"] > 0


def test_the_example_needs_the_file_and_three_packages(networks, images, tmp_path):
    """`examples/classify.py` names a picture's class, without torch or any code of ours."""
    made = quantized(networks, images, ConvScheme())
    names = [f"digit {number}" for number in range(10)]
    seen = {"size": 8, "channels": 1, "crop_ratio": 1.0, "interpolation": "bicubic"}
    about = {"pictures": seen | {"mean": [0.5], "std": [0.5]}, "names": names}
    save_classifier(tmp_path, made, images.train.inputs(slice(2)), about)
    picture, pixels = tmp_path / "picture.png", images.test.pixels[0, 0].numpy()
    Image.fromarray(pixels).save(picture)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'dpq_core', 'onnx')))"
    example = str(ROOT / "examples" / "classify.py")
    run = f"{blocked}; import runpy; runpy.run_path({example!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", run, str(tmp_path / MODEL), str(picture)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    expected = names[int(predict(Classifier(tmp_path), images.test.first(1)).argmax())]
    assert done.stdout.startswith(expected), done.stderr[-1000:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MODEL).write_bytes(b"\x08"), "unreadable"),
        (lambda folder: (folder / MANIFEST).unlink(), "not a quantized classifier"),
        (
            lambda folder: (folder / MANIFEST).write_text(json.dumps({"format_version": 9})),
            "format version 9 is unknown",
        ),
    ],
    ids=["file", "manifest", "version"],
)
def test_a_damaged_artifact_is_refused(damage, message, tmp_path):
    layer = prepared(nn.Conv2d(1, 2, 3).eval(), torch.zeros(2, 1, 8, 8))
    save_classifier(tmp_path, layer, torch.zeros(2, 1, 8, 8), {})
    Classifier(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        Classifier(tmp_path)


def test_sizes_are_those_of_what_is_stored(networks, folded, images, tmp_path):
    four = ConvScheme(weights=WeightScheme(bits=4))
    made = {"int8": quantized(networks, images, ConvScheme()), "float": folded["tiny"]}
    made["int4"] = quantized(networks, images, four)
    sizes = {}
    for name in made:
        (tmp_path / name).mkdir()
        saved(tmp_path / name, made[name], images)
        sizes[name] = weight_sizes(tmp_path / name / MODEL)
        assert sizes[name].file_bytes == (tmp_path / name / MODEL).stat().st_size
    weights = sum(p.numel() for p in networks["tiny"].parameters() if p.dim() > 1)
    assert {each.float_bytes for each in sizes.values()} == {4 * weights}
    assert sizes["int8"].stored_bytes == weights
    assert sizes["int4"].stored_bytes == weights / 2
    assert sizes["float"].stored_bytes == 4 * weights
    assert sizes["int8"].grid_bytes == 5 * (8 + 8 + 10)  # fp32 scale, int8 zero, a channel
    about = read_manifest(tmp_path / "float")["weights"]
    assert about["float_layers"] == ["0", "3", "8"]


def test_a_large_file_is_little_more_than_codes_and_scales(tmp_path):
    """Graph, biases and names are a tenth at most."""
    wide = nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 256, 3), nn.ReLU())
    pixels = torch.zeros(2, 3, 12, 12, dtype=torch.uint8)
    pictures = Images(pixels, torch.zeros(2, dtype=torch.long))
    made = post_training(wide.eval(), pictures, ConvScheme(), CALIBRATION)
    save_classifier(tmp_path, made, pictures.inputs(slice(2)), {})
    sizes = weight_sizes(tmp_path / MODEL)
    assert sizes.file_bytes <= 1.1 * (sizes.stored_bytes + sizes.grid_bytes)


def test_fine_tuning_recovers_what_four_bits_cost(networks, images):
    kind = "mobilenet"
    scheme = ConvScheme(
        weights=WeightScheme(bits=4, per="layer", symmetric=False),
        activations=ActivationScheme(bits=4),
    )
    before = {name: value.clone() for name, value in networks[kind].state_dict().items()}
    after = quantized(networks, images, scheme, kind)
    qat = QatSection(epochs=4, learning_rate=0.02)
    with seeded(0) as generator:
        tuned = fine_tune(
            networks[kind], images.train, scheme, TRAINING, qat, CALIBRATION, generator
        )
    losses = [  # on what it was trained on: 128 held-out images are noise
        nn.functional.cross_entropy(predict(made.graph, images.train), images.train.labels)
        for made in (after, tuned)
    ]
    assert losses[1] < 0.8 * losses[0]
    assert tuned.layers.keys() == after.layers.keys()
    assert all(layer.norm is None for layer in tuned.layers.values())
    assert all(torch.equal(before[name], v) for name, v in networks[kind].state_dict().items())


def test_an_average_that_never_moves_gives_the_weights_from_before(networks, images):
    few = images.train.first(64)
    still = QatSection(epochs=1, frozen_epochs=1, learning_rate=0.5, average=1 - 1e-12)
    with seeded(0) as generator:
        graph = fine_tune(
            networks["tiny"], few, ConvScheme(), TRAINING, still, CALIBRATION, generator
        )
    plain = quantized(networks, images, ConvScheme())
    for name, layer in plain.layers.items():
        torch.testing.assert_close(graph.layers[name].weight, layer.weight)
        assert torch.allclose(graph.layers[name].rounding.scale, layer.rounding.scale)


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
        graph = fine_tune(other, few, sixteen, TRAINING, still, CALIBRATION, generator)
    expected = predict(other, few)
    # Outliers beyond the first batch's range are cut.
    off = (predict(graph.graph, few) - expected).abs()
    assert off.mean() < 0.05 * expected.abs().mean()


def test_what_is_trained_is_what_runs_once_it_is_frozen(images):
    """The weight that is rounded in training, scaled back for the batch's own statistics, is the
    one of inference: at four bits, of running statistics that are the batch's."""
    scheme = ConvScheme(weights=WeightScheme(bits=4), activations=None)
    x = images.train.inputs(slice(64))
    made = rounding_graph(tiny(), x, scheme, training=True)
    first = next(iter(made.layers.values()))
    with torch.no_grad():
        first.norm.momentum, first.norm.frozen = 1.0, False
        first(x)  # the statistics of this batch, from here on
        trained = first(x)
        first.norm.frozen = True
        torch.testing.assert_close(first(x), trained, rtol=2e-2, atol=2e-2)
        frozen = first(x)
        first.fold()
        torch.testing.assert_close(first(x), frozen)


def test_gradients_go_through_but_for_what_is_clamped():
    x = torch.tensor([-3.0, -0.4, 0.26, 0.9, 5.0], requires_grad=True)
    grid = torch.tensor([0.25]), torch.tensor([2], dtype=torch.int32)
    y = rounded(x, *grid, Codes(0, 7, 8))
    assert y.tolist() == [-0.5, -0.5, 0.25, 1.0, 1.25]  # 0.9 / 0.25 = 3.6
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_frozen_batch_norm_keeps_its_statistics(images):
    with seeded(0):
        network = build_network(NetworkSection(**NARROW), images.shape, 10).train()
    x = images.train.inputs(slice(16))
    graph = rounding_graph(network, x, ConvScheme(), training=True).graph

    def moved():
        norms = [layer.norm for _, layer in layers_of(graph)]
        before = [norm.mean.clone() for norm in norms if norm is not None]
        graph(x)
        after = [norm.mean for norm in norms if norm is not None]
        return any(not torch.equal(*each) for each in zip(before, after, strict=True))

    freeze_batch_norm(graph, False)
    assert moved()
    freeze_batch_norm(graph, True)
    assert not moved()


@torch.no_grad()
def with_statistics(network, pictures):
    """Batch norm of these pictures: a network at random would give nothing but zeros."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()(pictures.inputs(slice(None)))
    return network.eval()


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
        network = with_statistics(build_network(section, (3, size, size), 8), pictures)
    made = post_training(network, pictures, ConvScheme(), CalibrationSection(batches=1))
    save_classifier(tmp_path, made, pictures.inputs(slice(2)), {})
    simulated = predict(made.graph, pictures)
    integers = predict(Classifier(tmp_path), pictures)
    rounding = (simulated - predict(network, pictures)).norm()  # at random they amplify it
    assert 0 < rounding < 2 * simulated.norm()
    assert (integers - simulated).norm() <= rounding
    assert kernel_counts(tmp_path) == {"integer": len(made.layers), "float": 0}


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
    path, example = tmp_path / "net.pt2", images.train.inputs(slice(2))
    save_program(networks["tiny"], path, example, dynamic=True)
    opened = build_network(NetworkSection(kind="exported", id=str(path)), images.shape, 10)
    ours, theirs = (
        post_training(network, images.train, ConvScheme(), CALIBRATION)
        for network in (networks["tiny"], opened)
    )
    assert ours.layers.keys() == theirs.layers.keys()
    assert torch.equal(predict(ours.graph, images.test), predict(theirs.graph, images.test))


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


SIZES = WeightSizes(4000, 1000, 80, 1100, ())
FLOAT_FILE = 4200


@pytest.mark.parametrize(
    ("wrong", "sizes", "checks", "reasons"),
    [
        (2, SIZES, {"integers": None}, []),
        (3, SIZES, {"integers": None}, ["accuracy: drop"]),
        (0, WeightSizes(4000, 1300, 80, 1400, ("head",)), {}, ["size_ratio: 3.00", "head"]),
        (0, SIZES, {"integers": "other classes"}, ["integrity: integers: other classes"]),
    ],
    ids=["within", "accuracy", "size", "integrity"],
)
def test_gates(wrong, sizes, checks, reasons, images):
    change = accuracy_change(scores_of(images, 0), scores_of(images, wrong))
    verdict = judge_classifier(change, sizes, FLOAT_FILE, checks, ConvGates(accuracy_drop=2.0))
    assert verdict.verdict == ("rejected" if reasons else "promoted")
    said = "; ".join(verdict.reasons)
    assert all(reason in said for reason in reasons)
    assert verdict.metrics["accuracy"].turned_wrong == wrong


@pytest.mark.parametrize(("allowed", "expected"), [(False, "inspected"), (True, "promoted")])
def test_some_of_the_images_do_not_promote_unless_the_gates_say_so(allowed, expected, images):
    change = accuracy_change(scores_of(images, 0), scores_of(images, 0))
    gates = ConvGates(allow_limited=allowed)
    verdict = judge_classifier(change, SIZES, FLOAT_FILE, {}, gates, limited="images.test_samples")
    assert verdict.verdict == expected
    assert any("images.test_samples left" in reason for reason in verdict.reasons) is not allowed


def test_a_float_network_that_is_not_finite_is_no_verdict(images):
    broken = score(torch.full((len(images.test), 10), torch.nan), images.test, "digits")
    change = accuracy_change(broken, scores_of(images, 0))
    assert judge_classifier(change, SIZES, FLOAT_FILE, {}, ConvGates()).verdict == "error"


def test_logits_that_are_not_finite_reject(images):
    logits = torch.zeros(len(images.test), 10)
    logits[5, 3] = torch.nan
    change = accuracy_change(scores_of(images, 0), score(logits, images.test, "digits"))
    verdict = judge_classifier(change, SIZES, FLOAT_FILE, {}, ConvGates())
    assert verdict.verdict == "rejected"
    assert "not finite" in verdict.reasons[0]


def test_a_float_network_that_does_not_know_the_pictures_is_named(images):
    """A wrong preset, or folders in another order than the classes."""
    gates = ConvGates(float_accuracy_at_least=70)
    assert float_checks(scores_of(images, 0), gates) == {"float accuracy": None}
    assert float_checks(scores_of(images, 0), ConvGates()) == {}
    said = float_checks(scores_of(images, 100), gates)["float accuracy"]
    assert "21.88 is below gates.float_accuracy_at_least 70: images.preset" in said
    assert chance_warning(scores_of(images, 0), 10) is None
    assert "21.88 % of the pictures, as by chance" not in (
        chance_warning(scores_of(images, 60), 10) or ""
    )
    assert "as by chance" in chance_warning(scores_of(images, 110), 10)


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", {"avx2": True}, True),
        ("x86_64", {"avx2": True, "avx_vnni": True}, False),
        ("AMD64", {"avx512_f": True, "avx512_vnni": True}, False),
        ("aarch64", {}, False),
    ],
)
def test_a_bit_is_left_out_where_products_of_bytes_saturate(
    machine, features, expected, monkeypatch
):
    monkeypatch.setattr(executor.platform, "machine", lambda: machine)
    monkeypatch.setattr(executor.torch.cpu, "get_capabilities", lambda: features)
    assert executor.saturates() is expected
    assert ConvScheme().on(expected).weights.reduce_range is expected
    asked = ConvScheme(weights=WeightScheme(reduce_range=False))
    assert asked.on(expected) == asked
    assert not ConvScheme(activations=None).on(True).weights.reduce_range


def test_the_layer_with_the_coarsest_grid_has_the_least_signal(networks, folded, images):
    """Four bits in one layer of a network of sixteen; what comes before it is not touched."""
    sixteen = WeightScheme(bits=16)
    made = quantized(networks, images, ConvScheme(weights=sixteen, activations=None))
    coarse = made.layers["3"]
    coarse.rounding = WeightRounding(WeightScheme(bits=4))
    noise = signal_to_noise(folded["tiny"], made, images.test.inputs(slice(None)))
    assert list(noise) == ["0", "3", "8"]
    assert noise["0"] > 60
    assert noise["3"] < 30
    assert next(iter(worst(noise, 1))) in ("3", "8")
    same = signal_to_noise(folded["tiny"], folded["tiny"], images.test.inputs(slice(None)))
    assert set(same.values()) == {float("inf")}

"""A classifier for other runtimes: what is written answers as what was scored, or is refused."""

import json

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from dpq_core.convnet import exports
from dpq_core.convnet.artifact import save_classifier
from dpq_core.convnet.exports import ConvExportError, export_classifier, pictures_in, sample
from dpq_core.convnet.files import MODEL
from dpq_core.convnet.images import load_images
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme, ImagesSection
from dpq_core.convnet.train import seeded
from flows.cli.main import app

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An artifact of a small network, and `pictures` beside it."""
    to = tmp_path_factory.mktemp("classifier")
    images = load_images(ImagesSection(train_samples=200, test_samples=COUNT))
    with seeded(0):
        layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
        network = nn.Sequential(*layers).eval()
    made = post_training(network, images.train, ConvScheme(), CalibrationSection())
    seen = {"crop_ratio": 1.0, "interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    about = {"pictures": {"size": 8, "channels": 1} | seen}
    save_classifier(to, made, images.train.inputs(slice(2)), about)
    (to / "pictures" / "more").mkdir(parents=True)
    for number, pixels in enumerate(images.test.pixels):
        Image.fromarray(pixels[0].numpy()).save(to / "pictures" / "more" / f"{number:02d}.png")
    (to / "pictures" / "notes.txt").write_text("none")
    return to


@pytest.fixture(scope="module")
def pictures(folder):
    return sample(folder, pictures_in(folder / "pictures", 64))


def test_pictures_are_read_as_the_network_does(pictures):
    expected = load_images(ImagesSection(train_samples=200, test_samples=COUNT)).test
    assert torch.equal(pictures.inputs(slice(None)), expected.inputs(slice(None)))


def test_onnx_is_the_scored_file(folder, pictures, tmp_path):
    found = export_classifier(folder, "onnx", tmp_path / "made", pictures)
    assert (tmp_path / "made" / MODEL).read_bytes() == (folder / MODEL).read_bytes()
    assert (found.same, found.pictures, found.distance) == (COUNT, COUNT, 0)


def test_openvino_gives_the_same_classes(folder, pictures, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: the extra of that name")
    found = export_classifier(folder, "openvino", tmp_path / "made", pictures)
    assert found.same >= COUNT - 1
    assert found.distance < 0.1
    assert found.files["model.bin"] < 1.1 * (folder / MODEL).stat().st_size


def test_a_missing_tool_is_named_with_its_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dpq_core.errors.find_spec", lambda name: None)
    monkeypatch.setattr("flows.cli.convnet.check_extra", lambda *names: None)
    result = run(folder, tmp_path, "openvino")
    assert result.exit_code == 1
    assert "the package openvino is not installed" in result.stdout
    assert "'.[openvino]'" in result.stdout


def run(folder, to, name, pictures="pictures", *more):
    command = ["convnet", "export", str(folder), str(to / "made"), "--format", name, "--json"]
    return CliRunner().invoke(app, [*command, "--pictures", str(folder / pictures), *more])


def test_the_command_writes_and_says_what_it_compared(folder, tmp_path):
    result = run(folder, tmp_path, "onnx", "pictures", "--most", "12")
    assert result.exit_code == 0, result.stdout
    found = json.loads(result.stdout)
    assert (found["pictures"], found["same"], list(found["files"])) == (12, 12, [MODEL])


@pytest.mark.parametrize(
    ("name", "pictures", "message"),
    [
        ("executorch", "pictures", "format executorch: ExecuTorch lowers programs of torch"),
        ("tflite", "pictures", "format 'tflite' is unknown: there are onnx, openvino, executorch"),
        ("onnx", "elsewhere", "0 pictures (.bmp, .jpeg, .jpg, .png, .webp) to compare with"),
    ],
)
def test_what_is_refused_leaves_nothing(name, pictures, message, folder, tmp_path):
    result = run(folder, tmp_path, name, pictures)
    assert result.exit_code == 1
    assert message in json.loads(result.stdout)["reasons"][0]
    assert not (tmp_path / "made").exists()


def test_another_file_s_answers_are_refused_and_removed(folder, pictures, tmp_path, monkeypatch):
    """A tool that writes something else."""
    other = exports.FORMATS["onnx"]
    wrong = exports._Format(other.write, lambda to: lambda x: -other.runs(to)(x))
    monkeypatch.setitem(exports.FORMATS, "onnx", wrong)
    with pytest.raises(ConvExportError, match="another class than the scored file's for"):
        export_classifier(folder, "onnx", tmp_path / "made", pictures)
    assert not (tmp_path / "made").exists()


def test_a_tool_s_error_is_one_line_and_an_existing_folder_stays(
    folder, pictures, tmp_path, monkeypatch
):
    def fails(model, to):
        raise RuntimeError("of\nthe tool")

    monkeypatch.setitem(exports.FORMATS, "onnx", exports._Format(fails, lambda to: None))
    with pytest.raises(ConvExportError, match="onnx: of the tool"):
        export_classifier(folder, "onnx", tmp_path / "made", pictures)
    (tmp_path / "made").mkdir()
    with pytest.raises(ConvExportError, match="exists: name a folder that does not"):
        export_classifier(folder, "onnx", tmp_path / "made", pictures)
    assert (tmp_path / "made").exists()


def test_a_picture_that_cannot_be_read(folder, tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"none")
    with pytest.raises(ConvExportError, match=r"0\.png: no picture that can be read"):
        sample(folder, pictures_in(tmp_path, 64))

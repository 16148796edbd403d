"""What the second pipeline is given: recipes, idx files, folders of pictures, histograms."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dpq_core.convnet.images import (
    ImagesError,
    load_images,
    read_idx,
    read_images,
    save_images,
    sources,
    square,
)
from dpq_core.convnet.ranges import percentile_range, squared_error_range
from dpq_core.convnet.recipe import ImagesSection, load_conv_recipe
from dpq_core.recipe import RecipeError


def idx(array):
    shape = struct.pack(f">{array.ndim}i", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("t10k", 5)):
        pixels = rng.integers(0, 256, (count, 9, 8)).astype(np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_idx_files_gzipped_or_not(folder, tmp_path):
    found = load_images(ImagesSection(source="idx", folder=str(folder), train_samples=7))
    assert found.train.pixels.shape == (7, 1, 9, 8)
    assert found.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (len(found.test), found.classes, found.shape) == (5, 3, (1, 9, 8))
    save_images(found, tmp_path / "images.safetensors")
    again = read_images(tmp_path / "images.safetensors")
    assert torch.equal(again.test.pixels, found.test.pixels)
    assert torch.equal(again.train.labels, found.train.labels)


def test_another_file_is_another_source(folder):
    section = ImagesSection(source="idx", folder=str(folder))
    before = sources(section)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(5, np.uint8)))
    changed = {name for name, found in sources(section).items() if found != before[name]}
    assert changed == {"t10k labels-idx1"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08", "unreadable"),
        (gzip.compress(b"GIF8"), "no idx file of bytes"),
        (gzip.compress(bytes([0, 0, 13, 1]) + struct.pack(">i", 1)), "no idx file of bytes"),
        (gzip.compress(bytes([0, 0, 8, 3, 0, 0])), "cut in its header"),
        (gzip.compress(idx(np.zeros(4, np.uint8))[:-1]), r"3 values, and its header says \(4,\)"),
    ],
    ids=["no gzip", "no idx", "floats", "short header", "short"],
)
def test_a_bad_idx_file_is_named(content, message, tmp_path):
    path = tmp_path / "t.gz"
    path.write_bytes(content)
    with pytest.raises(ImagesError, match=message):
        read_idx(path)


def test_missing_and_mismatched_files(folder):
    section = ImagesSection(source="idx", folder=str(folder))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ImagesError, match="do not belong together"):
        load_images(section)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ImagesError, match=r"neither train-labels-idx1-ubyte.gz nor"):
        sources(section)


@pytest.fixture
def pictures(tmp_path):
    for split in ("train", "test"):
        for name, colour in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 30), colour).save(tmp_path / split / name / "0.png")
    return tmp_path


def test_datasets_loads_folders_of_pictures(pictures):
    section = ImagesSection(source="datasets", path="imagefolder", data_dir=str(pictures), size=16)
    found = load_images(section)
    assert found.train.pixels.shape == (2, 3, 16, 16)
    for pixels, label in zip(found.test.pixels, found.test.labels, strict=True):
        assert int(pixels[0 if label == 0 else 2].min()) == 255
    with pytest.raises(ImagesError, match="no column 'photo', but image, label"):
        load_images(section.model_copy(update={"image_column": "photo"}))


def test_another_picture_is_another_source(pictures):
    section = ImagesSection(source="datasets", path="imagefolder", data_dir=str(pictures))
    before = sources(section)
    (pictures / "train" / "cat" / "1.png").write_bytes(b"")
    (pictures / "test" / "dog" / "0.png").unlink()
    after = sources(section)
    assert before.keys() ^ after.keys() == {"train/cat/1.png", "test/dog/0.png"}
    with pytest.raises(ImagesError, match=r"no such folder: images.data_dir"):
        sources(section.model_copy(update={"data_dir": str(pictures / "none")}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scheme.weights.bits=3", "Input should be 4, 8 or 16"),
        ("scheme.weights.per=layer", "weights per layer are asymmetric"),
        ("scheme.activations.percentile=20", "greater than 50"),
        ("network.kind=transformers", "needs id, or config.model_type"),
        ("network.id=x", "id is of kinds transformers and exported, not of mobilenet"),
        ("images.source=idx", "source idx needs folder"),
        ("qat.frozen_epochs=9", "frozen_epochs 9 exceed epochs"),
        ("training.epochs=0", "needs network.id"),
        ("gates.accuracy_drop=0", "greater than 0"),
        ("colour=red", "Extra inputs are not permitted"),
    ],
)
def test_a_bad_recipe_is_one_line(setting, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("images: {source: digits}\n")
    assert load_conv_recipe(path).images.source == "digits"
    with pytest.raises(RecipeError, match=message) as error:
        load_conv_recipe(path, [setting])
    assert "\n" not in str(error.value)


def histogram(values, bins=2048):
    low, high = values.min(), values.max()
    return torch.histc(values, bins, float(low), float(high)), low, high


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_of_a_histogram(percentile):
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    low, high = percentile_range(*histogram(values), percentile)
    width = (values.max() - values.min()) / 2048
    expected = torch.tensor(np.percentile(values.numpy(), [100 - percentile, percentile]))
    assert abs(float(low - expected[0])) <= 2 * width
    assert abs(float(high - expected[1])) <= 2 * width


def test_the_whole_range_is_the_hundredth_percentile():
    values = torch.tensor([-1.0, 0.0, 0.5, 3.0])
    low, high = percentile_range(*histogram(values), 100.0)
    assert (float(low), float(high)) == (-1.0, 3.0)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_least_squared_error_range_is_better_than_all_of_it(bits):
    """Of values with few outliers, by rounding the values themselves."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50_000, generator=generator).relu()
    values[:3] = 20.0
    levels = 2**bits - 1

    def error(low, high):
        scale = (high - low) / levels
        zero = torch.round(-low / scale)
        codes = (torch.round(values / scale) + zero).clamp(0, levels)
        return float(((codes - zero) * scale - values).square().mean())

    low, high = squared_error_range(*histogram(values), levels)
    whole = error(values.min(), values.max())
    best = min(error(values.min(), values.max() * part / 50) for part in range(5, 51))
    assert error(low, high) <= min(whole, 1.05 * best)
    if bits == 4:
        assert high < 0.5 * values.max()


def drawn(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (40 * number, 0, 0)).save(folder / name)
    return folder


def of_folder(folder, **fields):
    about = {"source": "datasets", "path": "imagefolder", "data_dir": str(folder), "size": 8}
    return load_images(ImagesSection(**about, **fields))


HALVES = {"train_split": "train[:1]", "test_split": "train[1:]"}


def test_a_folder_that_exists_is_that_folder(tmp_path):
    folder = drawn(tmp_path / "pictures[1]", "a/0.png", "b/1.png")
    assert of_folder(folder, **HALVES).classes == 2


def test_pictures_without_folders_of_classes_say_so(tmp_path):
    names = "train/0.png", "train/1.png", "test/2.png", "test/3.png"
    with pytest.raises(ImagesError, match=r"row 0: its class is None.*a folder for each class"):
        of_folder(drawn(tmp_path, *names))
    with pytest.raises(ImagesError, match=r"no column 'label', but image: .*a folder for each"):
        of_folder(drawn(tmp_path / "flat", "0.png", "1.png"), **HALVES)


def test_classes_that_are_no_numbers_are_named(tmp_path):
    drawn(tmp_path, "0.png", "1.png")
    rows = [{"file_name": f"{number}.png", "label": "cat"} for number in range(2)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ImagesError, match="row 0: its class is 'cat', no number"):
        of_folder(tmp_path, **HALVES)


def test_a_broken_picture_is_named(tmp_path):
    drawn(tmp_path, "a/0.png", "b/1.png")
    (tmp_path / "a" / "0.png").write_bytes(b"broken")
    with pytest.raises(ImagesError, match="row 0: no picture that can be read"):
        of_folder(tmp_path, **HALVES)


def test_a_preset_says_how_pictures_are_seen_and_fields_change_it(tmp_path):
    section = ImagesSection(preset="imagenet", crop_ratio=0.5, mean=[0.1, 0.2, 0.3])
    seen = section.pictures
    assert (seen.crop_ratio, seen.interpolation) == (0.5, "bilinear")
    assert (seen.mean, seen.std) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    folder = drawn(tmp_path, "a/0.png", "b/1.png")
    found = of_folder(folder, **HALVES, preset="imagenet")
    x = found.test.inputs(slice(None))
    pixel = found.test.pixels[0, :, 0, 0].double() / 255
    expected = (pixel - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x[0, :, 0, 0].double(), expected)
    assert found.names == ("a", "b")
    save_images(found, tmp_path / "images.safetensors")
    again = read_images(tmp_path / "images.safetensors")
    assert torch.equal(again.test.inputs(slice(None)), x)
    assert again.names == found.names
    with pytest.raises(ImagesError, match=r"images\.mean has 2 numbers, and the pictures 3 chan"):
        of_folder(folder, **HALVES, mean=[0.5, 0.5])
    with pytest.raises(ValueError, match=r"std is \[0\.0\]: deviations are above zero"):
        ImagesSection(std=[0.0])


@pytest.mark.parametrize(("ratio", "first"), [(1.0, 8), (0.5, 12)])
def test_the_middle_is_cut_out_of_a_picture_resized(ratio, first):
    """Of columns of growing brightness; a wide picture loses its ends in any case."""
    columns = np.arange(32, dtype=np.uint8)[None].repeat(16, 0) * 8
    picture = Image.fromarray(columns).convert("RGB")
    cut = square(picture, ImagesSection(size=16, crop_ratio=ratio, interpolation="nearest"))
    assert cut.shape == (3, 16, 16)
    assert cut[0, 0, 0] == columns[0, first]
    assert cut[0, 0, -1] == columns[0, 31 - first]

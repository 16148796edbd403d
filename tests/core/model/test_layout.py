"""Whatever a folder holds, the weights are those that transformers takes from it, or none."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.model.layout import INDEX, SINGLE
from dpq_core.model.reader import CheckpointError, CheckpointReader

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same model in one file and in shards; another one in one file."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("single", "sharded", "other")}
    for name, folder in folders.items():
        torch.manual_seed(name == "other")
        model = LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
        model.save_pretrained(folder, max_shard_size="20KB" if name == "sharded" else "5GB")
    assert (folders["sharded"] / INDEX).is_file()
    return folders


@pytest.fixture
def single(saved, tmp_path):
    return shutil.copytree(saved["single"], tmp_path / "model")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved["sharded"], tmp_path / "model")


def shards(folder):
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def stale_index(folder, saved):
    """Left by an earlier `save_pretrained`, its shards gone."""
    shutil.copy(saved["sharded"] / INDEX, folder)


def stale_shards(folder, saved):
    """Of another model, complete, with their index."""
    for path in (*saved["sharded"].glob("model-*"), saved["sharded"] / INDEX):
        shutil.copy(path, folder)
    first = folder / shards(folder)[0]
    save_file({k: v + 1 for k, v in load_file(first).items()}, first, metadata={"format": "pt"})


def other_formats(folder, saved):
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "weights.gguf"):
        shutil.copy(saved["other"] / SINGLE, folder / name)
    torch.save({"model.norm.weight": torch.zeros(32)}, folder / "pytorch_model.bin")


def named_file(folder, saved):
    """`transformers_weights` of config.json counts more than the usual name."""
    shutil.copy(saved["other"] / SINGLE, folder / "special.safetensors")
    edit(folder / "config.json", lambda c: c.update(transformers_weights="special.safetensors"))


def named_index(folder, saved):
    stale_shards(folder, saved)
    (folder / INDEX).rename(folder / "special.safetensors.index.json")
    edit(
        folder / "config.json",
        lambda c: c.update(transformers_weights="special.safetensors.index.json"),
    )


def links(folder, saved):
    """As in the hub's cache."""
    shutil.move(folder / SINGLE, folder.parent / "blob")
    (folder / SINGLE).symlink_to(folder.parent / "blob")


def as_transformers(folder):
    """Its parameters, and nothing that it would warn of."""
    model, info = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return dict(model.named_parameters())


def check_same(folder):
    reader, expected = CheckpointReader(folder), as_transformers(folder)
    assert set(reader.names) == set(expected)
    assert all(torch.equal(reader.tensor(name), value) for name, value in expected.items())
    return reader


@pytest.mark.parametrize(
    "change", [None, stale_index, stale_shards, other_formats, named_file, named_index, links]
)
def test_one_file_and_what_lies_beside_it(single, saved, change):
    if change:
        change(single, saved)
    reader = check_same(single)
    taken = saved["other" if change is named_file else "single"] / SINGLE
    if change is not named_index:
        head = reader.tensor("lm_head.weight")
        assert torch.equal(head, load_file(taken)["lm_head.weight"])


def leftover_shards(folder, saved):
    """More of an earlier save than the index names."""
    shutil.copy(saved["other"] / SINGLE, folder / "model-00009-of-00009.safetensors")


def unlisted_tensor(folder, saved):
    """A shard that the index names holds more than it says: transformers takes that too."""
    edit(folder / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))


@pytest.mark.parametrize("change", [None, leftover_shards, unlisted_tensor, other_formats])
def test_shards_and_what_lies_beside_them(sharded, saved, change):
    if change:
        change(sharded, saved)
    check_same(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    """transformers takes the last one that it reads, whatever the index says."""
    first, last = sharded / shards(sharded)[0], sharded / shards(sharded)[-1]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor + 1}, last, metadata={"format": "pt"})
    assert torch.equal(as_transformers(sharded)[name], tensor + 1)
    with pytest.raises(CheckpointError, match=f"{name} is in {first.name} and in {last.name}"):
        CheckpointReader(sharded)


def test_an_adapter_is_refused(single):
    """Where `peft` is installed transformers loads the adapter's base in place of the weights."""
    (single / "adapter_config.json").write_text('{"base_model_name_or_path": "another/model"}')
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: an adapter.*merge it"):
        CheckpointReader(single)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adapter_model.safetensors", "an adapter: merge it"),
        ("consolidated.safetensors", "not named as transformers names weights"),
        ("model.fp16.safetensors", "not named as transformers names weights"),
        ("weights-Q4_K_M.gguf", "GGUF, which is not read"),
        ("pytorch_model-00001-of-00002.bin", "pickled weights, which are not loaded"),
        ("consolidated.00.pth", "pickled weights, which are not loaded"),
    ],
)
def test_weights_of_other_names_alone_are_named(single, name, expected):
    (single / SINGLE).rename(single / name)
    with pytest.raises(CheckpointError, match=f"no {SINGLE} .*, but {name}: {expected}"):
        CheckpointReader(single)


def test_a_pointer_of_git_lfs_is_told(single):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (single / SINGLE).write_text(pointer)
    with pytest.raises(CheckpointError, match=f"{SINGLE}: a pointer of Git LFS.*git lfs pull"):
        CheckpointReader(single)


def test_a_link_to_nothing_is_no_file(sharded):
    """A hub cache that was cleaned by hand."""
    first = sharded / shards(sharded)[0]
    first.unlink()
    first.symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{first.name}: shard is missing"):
        CheckpointReader(sharded)


@pytest.mark.parametrize("named", ["../x.safetensors", "sub/x.safetensors", 7])
def test_weights_named_outside_of_the_folder_are_refused(single, named):
    edit(single / "config.json", lambda config: config.update(transformers_weights=named))
    with pytest.raises(CheckpointError, match=r"transformers_weights .* is not a plain file name"):
        CheckpointReader(single)

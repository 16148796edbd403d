"""Every architecture of docs/models.md: found, streamed, quantized and loaded, or refused."""

import os
import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, REFUSED, class_of, random_model
from model_families import FAMILIES, tokenizer
from torch import nn

from dpq_core.checkpoint.native import QuantizedCheckpoint, load_model, load_quantized
from dpq_core.kernels import products
from dpq_core.layer.linear import W4A8Linear
from dpq_core.model import observation
from dpq_core.model.anatomy import ArchitectureError
from dpq_core.model.empty import empty_of
from dpq_core.model.inputs import batches_of
from dpq_core.model.observation import anatomy_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.proof import prove
from dpq_core.model.streaming import StreamedModel, empty_model
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

PAGE = Path(__file__).parents[3] / "docs/models.md"
SCHEME = Scheme(group_size=24, rounding="nearest", order="none")
CALIBRATION = CalibrationSection(dataset=TextDataset(path="none"), min_tokens_per_input=0)


@pytest.fixture(autouse=True)
def by_libraries():
    """The models are compared, to the last bit, with transformers' own."""
    with products.by_libraries():
        yield


@pytest.fixture(scope="module")
def windows():
    return torch.randint(256, (4, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, windows):
    return model(input_ids=windows).logits


@torch.no_grad()
def streamed_logits(stream, windows):
    batches = stream.begin(batches_of(windows, 4))
    for index in range(stream.block_count):
        with stream.block(index):
            stream.advance(batches)
    return stream.logits(batches[0].hidden)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_architecture(architecture, windows, tmp_path):
    """The checkpoint as `save_pretrained` writes it, with the names of the hub."""
    base, out = tmp_path / "base", tmp_path / "out"
    random_model(architecture.config).to(torch.bfloat16).save_pretrained(base)
    tokenizer().save_pretrained(base)
    prove(empty_model(base))
    stream = StreamedModel(base)
    assert tuple(dict.fromkeys(stream.anatomy.groups)) == architecture.reads
    eager = {"experts_implementation": "eager"}
    kind = class_of(architecture.config)
    model = kind.from_pretrained(base, dtype=torch.bfloat16, **eager).eval()
    expected = logits_of(model, windows)
    assert torch.equal(streamed_logits(stream, windows), expected)
    assert torch.equal(logits_of(load_model(base), windows), expected)

    plan = plan_layers(stream, SCHEME)
    planned = [layer.name for layer in plan.layers]
    assert len(planned) == len(set(planned))
    linears = linears_of_blocks(stream)
    assert set(planned) | (plan.skipped.keys() & linears) == linears

    quantize_checkpoint(base, out, windows, SCHEME, CALIBRATION, {})
    QuantizedCheckpoint(out).verify()
    found = logits_of(load_quantized(out), windows)
    assert torch.equal(found, logits_of(by_hand(base, out), windows))
    assert torch.isfinite(found).all()
    assert not torch.equal(found, expected)


def linears_of_blocks(stream):
    under = f"{stream.anatomy.parts.blocks}."
    return {
        name
        for name, module in empty_model(stream.reader.folder).named_modules()
        if isinstance(module, nn.Linear) and name.startswith(under)
    }


def by_hand(base, out):
    """The 16-bit model with its linears replaced, one by one, by those on disk."""
    model, checkpoint = load_model(base), QuantizedCheckpoint(out)
    for name in checkpoint.shapes:
        linear = model.get_submodule(name)
        model.set_submodule(name, W4A8Linear(checkpoint.layer(name), linear.bias))
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_module_in_the_way(name):
    config, module = REFUSED[name]
    with pytest.raises(ArchitectureError, match=f"{config.model_type}.*{module}.*not quantized"):
        prove(empty_of(config))


# The proof can fail


def test_blocks_that_share_more_than_hidden_states_are_refused(monkeypatch):
    """A Llama whose blocks hand each other something besides what they return."""
    from transformers.models.llama import modeling_llama

    block = modeling_llama.LlamaDecoderLayer
    forward, first = block.forward, {}

    def sharing(self, *arguments, **named):
        found = forward(self, *arguments, **named)
        cosines = named["position_embeddings"][0]  # one tensor for all blocks of a forward pass
        shared = first.setdefault(id(cosines), (cosines, found))[1]
        return found if shared is found else found + shared

    monkeypatch.setattr(block, "forward", sharing)
    fresh(monkeypatch)
    with pytest.raises(ArchitectureError, match=r"run block by block.*differ.*more than hidden"):
        prove(empty_of(ARCHITECTURES[0].config))


def test_a_linear_that_is_called_twice_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaMLP.forward

    def twice(self, x):
        return forward(self, x) + forward(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", twice)
    fresh(monkeypatch)
    with pytest.raises(ArchitectureError, match=r"mlp\.gate_proj.*called 2 times"):
        anatomy_of(empty_of(ARCHITECTURES[0].config))


def test_equal_numbers_in_other_memory_are_not_one_input(monkeypatch):
    from transformers.models.llama import modeling_llama

    def copying(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x.clone()))

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", copying)
    fresh(monkeypatch)
    groups = anatomy_of(empty_of(ARCHITECTURES[0].config)).groups[0]
    assert groups[2:] == (("mlp.gate_proj",), ("mlp.up_proj",), ("mlp.down_proj",))


def fresh(monkeypatch):
    """Nothing is remembered of other tests, or of this one."""
    from dpq_core.model import proof

    monkeypatch.setattr(observation, "_FOUND", {})
    monkeypatch.setattr(proof, "_PROVEN", set())


# The page


def test_the_page_is_what_was_found():
    """`DPQ_WRITE_DOCS=1` writes it."""
    before, _, after = re.split(r"(<!-- written by \S+ -->\n|<!-- end -->)", PAGE.read_text())[::2]
    mark = "<!-- written by tests/core/model/test_architectures.py -->\n"
    page = f"{before}{mark}{table()}<!-- end -->{after}"
    if os.environ.get("DPQ_WRITE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "stale: DPQ_WRITE_DOCS=1 writes it"


def table():
    lines = ["| models | class of transformers | read together | |", "|---|---|---|---|"]
    with_tower = {"Qwen2-VL": "qwen2-vl", "Qwen2.5-VL": "qwen2.5-vl"}  # of test_families.py
    rows = [(each.name, each.config, each.why) for each in ARCHITECTURES]
    rows += [(name, FAMILIES[key].config, "with its tower") for name, key in with_tower.items()]
    for name, config, why in rows:
        groups = [group for kind in anatomy_of(empty_of(config)).groups for group in kind]
        together = dict.fromkeys(", ".join(map(short, each)) for each in groups if len(each) > 1)
        kind = class_of(config).__name__
        lines.append(f"| {name} | `{kind}` | {'; '.join(together) or 'nothing'} | {why} |")
    lines += ["", "Refused:", "", "| models | what stands in the way |", "|---|---|"]
    for name, (config, _) in REFUSED.items():
        lines.append(f"| {name} | {reason(config)} |")
    return "\n".join(lines) + "\n"


def reason(config):
    with pytest.raises(ArchitectureError) as refused:
        prove(empty_of(config))
    return re.sub(r"^\S+ \(model_type \S+\): |: this architecture.*$", "", str(refused.value))


def short(name):
    return f"`{name.rpartition('.')[2]}`"

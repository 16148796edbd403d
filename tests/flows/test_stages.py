"""Versions of arithmetic in cache keys: no byte of a stage changes without its version.

    python tests/flows/test_stages.py        records the bytes anew, in stages.json; then once more
                                             with the libraries' variables that name AVX2

Bytes are compared where they were recorded: the same class of processor, the same libraries, which
stand in the keys themselves. Numbers are compared everywhere, with those of processors that
multiply BF16 as it is, or as FP32 (a single token's divergence is another then), within what such
processors differ by: 5 %, more where blocks are quantized one after the other (8 % of a small
tensor behind two of them).
"""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import fields
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpq_core.checkpoint.exports import export_checkpoint
from dpq_core.digests import digest
from dpq_core.evaluation.divergence import by_request, divergence
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.requests import asked_of_windows
from dpq_core.evaluation.results import perplexity_scores
from dpq_core.evaluation.scorer import answers, last_states, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.kernels import products
from dpq_core.machine.device_kinds import kind_of
from dpq_core.model.inputs import batches_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme
from dpq_core.repair.sensitivity import Trial, block_losses

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for `python tests/flows/test_stages.py`

from tasks.support import stages  # noqa: E402
from tasks.support.stages import STAGES, computed_by  # noqa: E402

GOLDEN = Path(__file__).with_name("stages.json")
SECTION = CalibrationSection(dataset=TextDataset(path="none"), batch_size=2)
CORRECTED = SECTION.model_copy(update={"propagation": "groups", "correction": 0.5})
SCHEME = Scheme(group_size=32, scale_search="hessian")
# What they hold is an answer, not bytes: whether a checkpoint is whole, an answer right.
ANSWERS = {"model", "integrity", "suite"}
CONVNETS = {"images", "float-networks", "classifiers", "layer-losses", "image-scores"}
ARITHMETIC = kind_of("cpu").arithmetic(0)
PRODUCTS = "bf16" if products.bf16_units() else "fp32"


@cache
def folder():
    """A place for what this process makes."""
    return Path(tempfile.mkdtemp(prefix="stages-"))


@cache
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder() / "model")
    return folder() / "model"


def windows():
    return torch.randint(61, (4, 24), generator=torch.Generator().manual_seed(1))


def checkpoint(section=SECTION):
    """Statistics, layers and a checkpoint, as the tasks make them."""
    return _checkpoint(section)  # one key, however it is called


@cache
def _checkpoint(section):
    seen = {}
    choices = {"model.layers.0.mlp.down_proj": "w8a8", "model.layers.1.self_attn.o_proj": "bf16"}
    with pytest.MonkeyPatch.context() as patch:
        calibrate = quantize_checkpoint.__globals__["calibrate_block"]

        def observed(*arguments):
            found = calibrate(*arguments)
            for name, each in found.items():
                for field, tensor in each.tensors().items():
                    seen[f"{name}.{field}"] = tensor.clone()
            return found

        patch.setitem(quantize_checkpoint.__globals__, "calibrate_block", observed)
        to = folder() / f"checkpoint-{section.propagation}"
        about = {"base_model": {"id": "golden", "revision": None, "digest": "", "licence": None}}
        about["base_model"] |= {"trust_remote_code": False}
        about["calibration"] = {"windows": "golden"}
        manifest = quantize_checkpoint(model(), to, windows(), SCHEME, section, about, choices)
    return to, manifest, seen


def bytes_of(tensors):
    """Digest of tensors by name."""
    content = sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        content.update(name.encode() + flat.numpy().tobytes())
    return content.hexdigest()


def of_tensors(tensors):
    """Their digest, and the mean size of each."""
    means = [t.detach().double().abs().mean() for _, t in sorted(tensors.items()) if t.ndim]
    numbers = [float(mean) for mean in means]
    return bytes_of(tensors), numbers


def of_numbers(numbers):
    return digest(numbers), numbers


def statistics(section=SECTION):
    return of_tensors(checkpoint(section)[2])


def layers(section=SECTION):
    to, manifest, _ = checkpoint(section)
    names = {row["name"] for row in manifest["layers"]}
    tensors = {
        name: tensor
        for path in to.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.rpartition(".")[0] in names
    }
    return bytes_of(tensors), [row["error"] for row in manifest["layers"]]


def checkpoints():
    _, manifest, _ = checkpoint()
    return digest(manifest["files"]), [manifest["bytes_per_weight"]]


def exports():
    to = folder() / "export"
    to.mkdir()
    manifest = export_checkpoint(_symmetric(), to, "compressed-tensors")
    assert not any(manifest["checks"].values()), manifest["checks"]
    of_weights = {n: d for n, d in manifest["files"].items() if n.endswith(".safetensors")}
    return digest(of_weights), [manifest["bits_per_weight"]]


def _symmetric():
    scheme = Scheme(preset="hopper-vllm", group_size=32)
    about = checkpoint()[1]
    about = {key: about[key] for key in ("base_model", "calibration")}
    quantize_checkpoint(model(), folder() / "symmetric", windows(), scheme, SECTION, about)
    return folder() / "symmetric"


def asked():
    return list(chunks_of(asked_of_windows(windows()), tokens=48))


def requests():
    return of_tensors(
        {
            f"{number}.{field.name}": getattr(chunk, field.name)
            for number, chunk in enumerate(asked())
            for field in fields(chunk)
        }
    )


def chunk_scores():
    found = score(subject_of(checkpoint()[0]), asked())
    return of_numbers([total for each in found for total in each.sums.tolist()])


def perplexity():
    found = answers(score(subject_of(model()), asked()), len(windows()))
    return of_numbers(perplexity_scores(windows(), found).values)


def states_of(folder):
    subject = subject_of(folder)
    return subject, last_states(subject, asked())


def states():
    found = enumerate(states_of(model())[1])
    return of_tensors({str(number): each.hidden for number, each in found})


@cache
def nats():
    (before, theirs), (after, ours) = states_of(model()), states_of(checkpoint()[0])
    with head_tiles(before.stream) as p, head_tiles(after.stream) as q:
        pairs = zip(theirs, ours, strict=True)
        return [divergence(p, each.hidden, q, other.hidden) for each, other in pairs]


def divergences():
    return of_numbers([found for each in nats() for found in each.nats.tolist()])


def divergence_by_request():
    parts = zip((chunk.requests for chunk in asked()), nats(), strict=True)
    return of_numbers(by_request(parts).nats.tolist())


def begun():
    stream = StreamedModel(model())
    return stream, stream.begin(batches_of(windows(), 2))


def sensitivity():
    from dpq_core.checkpoint.native import QuantizedCheckpoint

    native = QuantizedCheckpoint(checkpoint()[0])
    stream = StreamedModel(model(), dtype=torch.float32)
    batches = stream.begin(batches_of(windows(), 2))
    names = ["model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    layers = {Trial(name, "golden"): lambda name=name: native.layer(name) for name in names}
    return of_numbers([*block_losses(stream, 0, batches, layers).values()])


def made_by_convnets(stage):
    """Digits, a network trained on some of them, quantized, scored."""
    from dpq_core.convnet.artifact import save_classifier
    from dpq_core.convnet.executor import Classifier
    from dpq_core.convnet.files import MODEL
    from dpq_core.convnet.images import ImageSet, load_images
    from dpq_core.convnet.networks import build_network
    from dpq_core.convnet.quantize import post_training
    from dpq_core.convnet.recipe import (
        CalibrationSection,
        ConvScheme,
        ImagesSection,
        NetworkSection,
        TrainingSection,
    )
    from dpq_core.convnet.train import fit, predict, seeded

    images: ImageSet = load_images(ImagesSection(train_samples=64, test_samples=32))
    pixels = {"train": images.train.pixels, "test": images.test.pixels}
    if stage == "images":
        return of_tensors(pixels)
    training = TrainingSection(epochs=1, batch_size=16)
    with seeded(0) as generator:
        network = build_network(NetworkSection(width=0.5), images.shape, images.classes).train()
        fit(network, images.train, training, 1, 0.1, generator)
    if stage == "float-networks":
        weights = {k: t for k, t in network.state_dict().items() if t.is_floating_point()}
        return of_tensors(weights)
    scheme = ConvScheme().on(saturates=False)
    if stage == "layer-losses":
        return losses_of_layers(network, images, scheme)
    made = post_training(network, images.train, scheme, CalibrationSection(batches=2))
    to = folder() / stage
    to.mkdir()
    save_classifier(to, made, images.train.inputs(slice(2)), {})
    logits = predict(Classifier(to), images.test)
    if stage == "classifiers":
        content = sha256((to / MODEL).read_bytes()).hexdigest()
        return content, [float(logits.abs().mean())]
    return of_tensors({"logits": logits})


def losses_of_layers(network, images, scheme):
    from dpq_core.convnet.quantize import post_training
    from dpq_core.convnet.recipe import CalibrationSection, ConvScheme
    from dpq_core.convnet.repair import trials

    none = ConvScheme(weights=None, activations=None)
    network.get_parameter("7.weight").data.mul_(400)  # hardly trained, it is sure of nothing
    before = post_training(network, images.train, none, CalibrationSection())
    found = trials(before, scheme, [4], images.train.inputs(slice(16)))
    return of_tensors({"losses": torch.tensor([each.loss for each in found if each.bits == 4])})


MAKERS = {
    "statistics": statistics,
    "layers": layers,
    "statistics, corrected": partial(statistics, CORRECTED),
    "layers, corrected": partial(layers, CORRECTED),
    "checkpoints": checkpoints,
    "exports": exports,
    "requests": requests,
    "chunk-scores": chunk_scores,
    "last-states": states,
    "divergences": divergences,
    "divergence": divergence_by_request,
    "perplexity": perplexity,
    "sensitivity": sensitivity,
}


def made(stage):
    if stage in CONVNETS:
        return made_by_convnets(stage)
    return MAKERS[stage]()


# Whose bytes a stage's are made from: other bytes there are other bytes here.
_QUANTIZED = ("statistics", "layers")
AFTER = {
    "layers": ("statistics",),
    "statistics, corrected": ("layers",),
    "layers, corrected": _QUANTIZED,
    "checkpoints": _QUANTIZED,
    "exports": (*_QUANTIZED, "checkpoints"),
    "chunk-scores": (*_QUANTIZED, "checkpoints", "requests"),
    "last-states": ("requests",),
    "divergences": (*_QUANTIZED, "checkpoints", "requests"),
    "divergence": (*_QUANTIZED, "checkpoints", "requests"),
    "perplexity": ("requests",),
    "sensitivity": _QUANTIZED,
    "float-networks": ("images",),
    "classifiers": ("images", "float-networks"),
    "image-scores": ("images", "float-networks", "classifiers"),
}


def version_of(stage):
    """Of a stage, or of a way that it goes (`statistics, corrected`)."""
    return STAGES[stage.partition(",")[0]].version


def where(stage):
    """Names the class of arithmetic, all libraries, and the versions of the stages before."""
    libraries = {name: stages._installed(name) for row in STAGES.values() for name in row.libraries}
    before = [version_of(name) for name in AFTER.get(stage, ())]
    return digest([ARITHMETIC, libraries, before])[:16]


def test_every_stage_has_golden_bytes_or_holds_an_answer():
    assert {name.partition(",")[0] for name in MAKERS} | CONVNETS | ANSWERS == STAGES.keys()
    assert json.loads(GOLDEN.read_text()).keys() == MAKERS.keys() | CONVNETS


@pytest.mark.parametrize("stage", [*MAKERS, *sorted(CONVNETS)])
def test_a_stage_s_bytes_change_with_its_version_only(stage):
    golden = json.loads(GOLDEN.read_text())[stage]
    remedy = (
        f"raise the version of {stage} in tasks/support/stages.py, or undo the change; then record:"
        " python tests/flows/test_stages.py"
    )
    assert golden["version"] == version_of(stage), remedy
    content, numbers = made(stage)
    allowed = 0.2 if "corrected" in stage else 0.05
    assert numbers == pytest.approx(golden["numbers"][PRODUCTS], rel=allowed, abs=1e-6), remedy
    assert content == golden["sha256"].get(where(stage), content), remedy


def test_keys_hold_no_digest_of_sources():
    """A comment discarded all Hessians once, and had the baseline scored again."""
    users = [p.name for p in (ROOT / "tasks").rglob("*.py") if "code_digest" in p.read_text()]
    assert users == ["environment.py"]  # for the run's record


@pytest.mark.parametrize("changed", ["version", "library", "processor"])
@pytest.mark.parametrize("stage", ["statistics", "layers", "chunk-scores", "suite", "classifiers"])
def test_what_computes_is_in_the_key(stage, changed, monkeypatch):
    before = digest(computed_by(stage, ARITHMETIC))
    assert digest(computed_by(stage, ARITHMETIC)) == before
    arithmetic = ARITHMETIC
    if changed == "version":
        row = STAGES[stage]
        monkeypatch.setitem(STAGES, stage, stages.Stage(row.version + 1, row.libraries))
    elif changed == "library":
        monkeypatch.setattr(stages, "_installed", lambda name: f"{name} of tomorrow")
    else:
        arithmetic = "cpu-avx2-fp32"
    assert digest(computed_by(stage, arithmetic)) != before


@pytest.mark.parametrize("stage", ["chunk-scores", "last-states", "statistics", "sensitivity"])
def test_a_forward_pass_is_of_transformers_too(stage):
    assert {"torch", "transformers"} <= set(STAGES[stage].libraries)


def test_the_class_of_a_processor_has_the_units_that_multiply(monkeypatch):
    """AMX and AVX512_BF16 add in different orders; told to leave units out, libraries do."""
    from dpq_core.kernels import products
    from dpq_core.machine import device_kinds

    classes = set()
    for units in ((), ("avx512_bf16",), ("avx512_bf16", "amx_bf16")):
        monkeypatch.setattr(products, "features", lambda units=units: ("avx512_f", *units))
        classes.add(device_kinds.kind_of("cpu").arithmetic(0))
    monkeypatch.setattr(products, "limits", lambda: {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    classes.add(device_kinds.kind_of("cpu").arithmetic(0))
    assert len(classes) == 4


def test_a_network_is_known_by_the_weights_behind_its_id(tmp_path):
    """Trained again and saved to the same path, it was the old one's parameters that were found."""
    from dpq_core.convnet.recipe import NetworkSection
    from tasks.convnet import _weights_of

    section = NetworkSection(kind="transformers", id=str(tmp_path))
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(4)}, path)
    before, stat = _weights_of(section), path.stat()
    save_file({"weight": torch.ones(4)}, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert before.keys() == _weights_of(section).keys() == {"model.safetensors"}
    assert _weights_of(section) != before
    assert _weights_of(NetworkSection()) == {}


def test_weights_copied_over_with_their_time_are_another_model(tmp_path):
    """`cp -p` of new weights of the same size: the old digest was found, and the old scores."""
    from infra.store import Store
    from tasks.support.model import content_digest

    here, store = shutil.copytree(model(), tmp_path / "model"), Store(tmp_path / "store")
    path, new = here / "model.safetensors", tmp_path / "new.safetensors"
    tensors = load_file(path)
    before = content_digest(here, store)
    save_file(tensors | {"model.norm.weight": -tensors["model.norm.weight"]}, new, {"format": "pt"})
    stat = path.stat()
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    shutil.copy2(new, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert content_digest(here, store) != before


def record():
    torch.set_num_threads(1)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for stage in [*MAKERS, *sorted(CONVNETS)]:
        content, numbers = made(stage)
        version = version_of(stage)
        known = golden.get(stage, {})
        kept = known if known.get("version") == version else {"numbers": {}, "sha256": {}}
        golden[stage] = {
            "version": version,
            "numbers": kept["numbers"] | {PRODUCTS: [float(f"{each:.6g}") for each in numbers]},
            "sha256": kept["sha256"] | {where(stage): content},
        }
    GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(folder())


if __name__ == "__main__":
    record()

"""Archives of torch.export that are more than data: each would run something when it is loaded,
moved to the device or run, and is refused."""

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn
from torch.export.pt2_archive._package import PT2ArchiveWriter
from transformers import AutoConfig, AutoModelForImageClassification

from dpq_core.convnet.archive import ArchiveError, graph_of, open_archive
from dpq_core.convnet.networks import NetworkError, build_network
from dpq_core.convnet.recipe import NetworkSection

PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
INPUTS, CONSTANTS = "data/sample_inputs/model.pt", "data/constants/model_constants_config.json"


class Touches:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "net.pt2"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU("tanh"), nn.Flatten(), nn.Linear(144, 5))
    batch = torch.export.Dim("batch", min=1, max=64)
    example = torch.zeros(2, 3, 8, 8)
    program = torch.export.export(network.eval(), (example,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    return path, program


@pytest.fixture
def changed(saved, tmp_path):
    """Write the archive anew, some of its records other bytes, or more of them."""

    def write(records, outside=()):
        path = tmp_path / "net.pt2"
        with zipfile.ZipFile(saved[0]) as old, PT2ArchiveWriter(str(path)) as writer:
            stored = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
            for record, content in {**stored, **records}.items():
                if not record.startswith(".data/") and record != "byteorder":  # the writer's own
                    writer.write_bytes(record, content)
        with zipfile.ZipFile(path, "a") as more:
            for name in outside:
                more.writestr(name, outside[name])
        return path

    return write


def program_of(saved, change):
    with zipfile.ZipFile(saved[0]) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(PROGRAM))
        content = json.loads(archive.read(name))
    change(content)
    return json.dumps(content).encode()


def torch_pickle(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def test_a_saved_network_is_read(saved, changed):
    path, program = saved
    images = torch.randn(5, 3, 8, 8)
    for each in (path, changed({})):
        assert torch.equal(graph_of(open_archive(each))(images), program.module()(images))


def first_node(content):
    return content["graph_module"]["graph"]["nodes"][0]


@pytest.mark.parametrize("target", ["torch.os.system", "torch.hub.load", "torch.ops.aten.save"])
def test_a_node_that_calls_something_else(saved, changed, target):
    program = program_of(saved, lambda content: first_node(content).update(target=target))
    with pytest.raises(ArchiveError, match=f"target '{target}' is no operation on tensors"):
        open_archive(changed({PROGRAM: program}))


@pytest.mark.parametrize("call", ["open('{}', 'w')", "Symbol('s1').__class__.f('{}')"])
def test_a_size_that_is_an_expression_of_python(saved, changed, tmp_path, call):
    made = tmp_path / "made"
    expression = call.format(made)

    def change(content):
        for value in content["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = expression

    with pytest.raises(ArchiveError, match=r"expr_str .* is no operation"):
        open_archive(changed({PROGRAM: program_of(saved, change)}))
    assert not made.exists()


def test_what_is_pickled(saved, changed, tmp_path):
    made = tmp_path / "made"
    torch_bytes, plain = torch_pickle(Touches(made)), pickle.dumps(Touches(made))
    with zipfile.ZipFile(saved[0]) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(WEIGHTS))
        weights = json.loads(archive.read(name))
    about = next(iter(weights["config"].values()))
    about["use_pickle"] = True
    opaque = {"config": {"x": {**about, "path_name": "opaque_obj_0", "is_param": False}}}
    cases = [
        {WEIGHTS: json.dumps(weights).encode(), "data/weights/weight_0": torch_bytes},
        {CONSTANTS: json.dumps(opaque).encode(), "data/constants/opaque_obj_0": plain},
        {CONSTANTS: json.dumps(opaque).encode()},
        {INPUTS: torch_bytes},
        {"data/weights/model.pt": torch_bytes},
        {"data/constants/model.pt": torch_bytes},
    ]
    for records in cases:
        with pytest.raises((ArchiveError, pickle.UnpicklingError)):
            open_archive(changed(records))
        assert not made.exists()


def test_compiled_code_and_older_forms(saved, changed, tmp_path):
    with pytest.raises(ArchiveError, match=r"data/aotinductor/model/x\.so is no part of"):
        open_archive(changed({"data/aotinductor/model/x.so": b"\x7fELF"}))
    made = tmp_path / "made"
    older = {"version": "8.8", "serialized_exported_program.json": "{}"}
    older |= {"serialized_constants.pt": torch_pickle(Touches(made))}
    broken = program_of(saved, lambda content: first_node(content).update(target="_operator.lt"))
    with pytest.raises(Exception):  # noqa: B017, PT011 - torch's, whatever it is
        graph_of(open_archive(changed({PROGRAM: broken}, outside=older)))(torch.zeros(1, 3, 8, 8))
    assert not made.exists()


def test_the_pipeline_names_the_file_and_the_reason(saved, changed):
    program = program_of(
        saved, lambda content: first_node(content).update(target="torch.os.system")
    )
    path = changed({PROGRAM: program})
    with pytest.raises(
        NetworkError, match=r"net\.pt2: unreadable: target 'torch\.os\.system' is no"
    ):
        build_network(NetworkSection(kind="exported", id=str(path)), (3, 8, 8), 5)


@pytest.fixture(scope="module")
def own_code(tmp_path_factory):
    """A classifier with code of its own, which makes a file."""
    folder = tmp_path_factory.mktemp("own code")
    fields = {"depths": [1], "hidden_sizes": [8], "embedding_size": 8, "num_labels": 5}
    config = AutoConfig.for_model("resnet", **fields)
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    (folder / "own.py").write_text(f"open({str(folder / 'made')!r}, 'w')\n")
    return folder


@pytest.mark.parametrize(
    "name", ["trust_remote_code", "use_safetensors", "weights_only", "attn_implementation", "_x"]
)
def test_what_is_no_field_of_a_configuration_reaches_no_loader(own_code, name):
    for section in (
        {"id": str(own_code), "config": {name: True}},
        {"config": {"model_type": "resnet", name: True}},
    ):
        with pytest.raises(NetworkError, match=rf"network\.config\.{name} is no field of resnet"):
            build_network(NetworkSection(kind="transformers", **section), (3, 32, 32), 5)


def test_a_classifier_s_own_code_is_not_run_and_pickles_are_not_read(own_code):
    section = NetworkSection(kind="transformers", id=str(own_code), config={"hidden_act": "silu"})
    network = build_network(section, (3, 32, 32), 5)
    assert network.model.config.hidden_act == "silu"
    config = json.loads((own_code / "config.json").read_text())
    auto = {"AutoConfig": "own.Own", "AutoModelForImageClassification": "own.Own"}
    (own_code / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    build_network(section, (3, 32, 32), 5)
    state = torch_pickle(network.model.state_dict())
    (own_code / "model.safetensors").unlink()
    (own_code / "pytorch_model.bin").write_bytes(state)
    with pytest.raises(NetworkError, match="safetensors"):
        build_network(section, (3, 32, 32), 5)
    assert not (own_code / "made").exists()

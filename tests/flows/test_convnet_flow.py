"""`dpq convnet` on real services: verdicts, fine-tuning, registry, store, exit codes, ladder."""

import json

import pytest
import torch
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from torch import nn
from typer.testing import CliRunner

from dpq_core.convnet.images import load_images
from dpq_core.convnet.recipe import ImagesSection
from dpq_core.verdict.halves import ALL, JUDGING
from flows.cli.main import app
from infra.registry import Registry
from infra.registry.tracking import mlflow_client, tracking_store

NAME = "convnet-tests"


@pytest.fixture
def convnet(services_home, store, tmp_path):
    """Run `dpq convnet [compare] RECIPE …`, small and on digits."""
    path = tmp_path / "recipe.yaml"
    content = {
        "network": {"width": 0.5},
        "images": {"train_samples": 800, "test_samples": 256},
        "training": {"epochs": 3, "batch_size": 32},
        "calibration": {"batches": 8},
        "qat": {"epochs": 1},
        "gates": {"accuracy_drop": 10, "allow_limited": True, "size_ratio": 1.1},
        "benchmark": {"batches": [32], "runs": 3},
        "registry": {"name": NAME},
        "execution": {"store": str(store)},
    }
    path.write_text(json.dumps(content))

    def run(*arguments, command=()):
        return CliRunner().invoke(app, ["convnet", *command, str(path), *arguments])

    return run


@pytest.fixture
def registry(services_home):
    return Registry(tracking_store(services_home)[0])


def artifacts(store):
    stages = ("images", "float-networks", "classifiers", "image-scores")
    return {folder for stage in stages for folder in (store / stage).glob("*")}


def shown_of(key, run_id):
    """The Markdown of an artifact on the Prefect page of the run that is this one in MLflow."""
    with get_client(sync_client=True) as prefect:
        ours = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
        found = prefect.read_artifacts(artifact_filter=ours)
    (shown,) = [each.data for each in found if run_id in str(each.data)]
    return shown


def test_promoted_registered_and_computed_once(convnet, registry, store, services_home):
    first = convnet("--json")
    assert first.exit_code == 0, first.stderr
    content = json.loads(first.stdout)
    assert (content["verdict"], content["method"]) == ("promoted", "post-training")
    assert 1.1 < content["metrics"]["size_ratio"]["candidate"] < 4
    assert content["judged_on"] == JUDGING
    assert 100 < content["metrics"]["accuracy"]["documents"] < 156  # of 256
    assert content["attempts"][0]["arithmetic"] == "integer"
    noise = [row["signal to noise, dB"] for row in content["worst_layers"]]
    assert len(noise) == 10
    assert noise == sorted(noise)
    assert content["latency"][0]["batch"] == 32
    assert min(content["latency"][0].values()) > 0
    assert registry.champion(NAME) == content["model_version"]
    run = mlflow_client(tracking_store(services_home)[0]).get_run(content["run_id"])
    assert run.data.tags["verdict"] == "promoted"
    assert run.data.metrics["accuracy.candidate"] == content["metrics"]["accuracy"]["candidate"]
    assert f"version {content['model_version']}, " in shown_of("verdict", content["run_id"])
    before = artifacts(store)
    again = json.loads(convnet("--json").stdout)
    assert artifacts(store) == before
    assert again["model_version"] == content["model_version"]
    assert again["metrics"] == content["metrics"]


def test_fine_tuned_where_the_gate_fails_and_rejected_where_that_does_not_help(convnet, registry):
    champion = registry.champion(NAME)
    result = convnet("--json", "--set", "gates.size_ratio=4.5")
    assert result.exit_code == 2, result.stderr
    content = json.loads(result.stdout)
    assert content["verdict"] == "rejected"
    assert [each["method"] for each in content["attempts"]] == ["post-training", "fine-tuned"]
    (reason,) = content["reasons"]
    assert reason.startswith("size_ratio: ")
    assert reason.endswith(" is below the limit of 4.5")
    assert registry.champion(NAME) == champion
    alone = convnet("--json", "--set", "gates.size_ratio=4.5", "--set", "qat.enabled=false")
    content = json.loads(alone.stdout)
    assert len(content["attempts"]) == 1
    assert content["judged_on"] == ALL
    assert content["metrics"]["accuracy"]["documents"] == 256


@pytest.fixture
def uneven(tmp_path):
    """A file of a linear network for digits, a channel for each row of pixels, scaled and scaled
    back. Eight bits per layer hold all rows; of four, the first layer loses the small ones and the
    second the large ones."""
    images = load_images(ImagesSection(source="digits", train_samples=800)).train
    pixels = images.inputs(slice(None)).flatten(1)
    wanted = nn.functional.one_hot(images.labels).float()
    classes = torch.linalg.solve(pixels.T @ pixels + torch.eye(64), pixels.T @ wanted)
    scales = torch.tensor([1, 0.05, -1, -0.05, 0.22, -0.22, 0.22, -0.22])
    narrow, wide, head = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1, groups=8), nn.Linear(512, 10)
    rows = torch.eye(8).repeat_interleave(8, dim=1)  # of pixels, that a channel is for
    network = nn.Sequential(narrow, wide, nn.Flatten(), head).eval()
    with torch.no_grad():
        for each in (narrow, wide, head):
            each.bias.zero_()
        narrow.weight.copy_(scales.view(8, 1, 1, 1))
        wide.weight.copy_((1 / scales).view(8, 1, 1, 1))
        head.weight.copy_((rows[:, :, None] * classes).reshape(512, 10).T)
    path, shapes = tmp_path / "uneven.pt2", ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(network, (images.inputs(slice(2)),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


def test_repair_gives_the_worst_layers_more_bits_until_the_gates_pass(convnet, uneven):
    """Half of what four bits per layer and nearest codes lose is let by."""
    weights = "{bits: 4, per: layer, symmetric: false, rounding: nearest}"
    plain = [f"scheme.weights={weights}", "scheme.bias_correction=false", "qat.enabled=false"]
    network = f"network={{kind: exported, id: {uneven}}}"
    plain += [network, "training.epochs=0", f"registry.name={NAME}-uneven"]

    def released(*more):
        sets = (word for each in (*plain, *more) for word in ("--set", each))
        return json.loads(convnet("--json", *sets).stdout)

    (ruined,) = released()["attempts"]
    assert ruined["delta"] < -10
    repair = "repair={enabled: true, max_bits_per_weight: 8, max_rounds: 2}"
    content = released(repair, f"gates.accuracy_drop={-ruined['delta'] / 2}")
    first, *rounds = content["attempts"]
    assert (first["layers raised"], first["gates missed"]) == (0, "accuracy")
    raised = [each["layers raised"] for each in rounds]
    assert 0 < raised[0] <= raised[-1]
    assert all(each["delta"] > first["delta"] for each in rounds)
    assert rounds[-1]["gates missed"] == "none"
    assert content["judged_on"] == JUDGING


def test_some_of_the_images_promote_nothing(convnet, registry):
    champion = registry.champion(NAME)
    result = convnet("--json", "--set", "gates.allow_limited=false")
    assert result.exit_code == 2, result.stderr
    content = json.loads(result.stdout)
    assert content["verdict"] == "inspected"
    assert content["reasons"][0].startswith("images.test_samples left documents out")
    assert registry.champion(NAME) == champion


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scheme.weights.bits=5", "scheme.weights.bits"),
        ("images={source: idx, folder: /nowhere}", "/nowhere: neither"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(setting, message, convnet):
    result = convnet("--json", "--set", setting)
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["verdict"] == "error"
    assert message in content["reasons"][0]


def test_the_ladder_has_a_row_a_variant(convnet, monkeypatch):
    from flows import convnet as module

    few = ("weights only, per layer", "per channel", "per layer")
    known = (*few, "QAT per channel")
    monkeypatch.setattr(module, "LADDER", {name: module.LADDER[name] for name in known})
    result = convnet("--json", "--set", "qat.enabled=false", command=["compare"])
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    rows = {row["variant"]: row for row in content["rows"]}
    assert list(rows) == ["float", *few]
    assert rows["per channel"]["arithmetic"] == "integer"
    assert rows["weights only, per layer"]["arithmetic"] == "simulated"
    for row in content["rows"][1:]:
        assert row["delta"] == pytest.approx(row["accuracy"] - rows["float"]["accuracy"])
        assert 1 < row["size_ratio"] < 4


def test_a_float_network_below_the_recipe_s_limit_promotes_nothing(convnet, registry):
    """A wrong mean costs points, and an order of classes that is another all of them."""
    champion = registry.champion(NAME)
    limit = ("--set", "gates.float_accuracy_at_least=99.9")
    result = convnet("--json", "--set", "qat.enabled=false", *limit)
    assert result.exit_code == 2, result.stderr
    (reason,) = json.loads(result.stdout)["reasons"]
    assert "is below gates.float_accuracy_at_least 99.9: images.preset" in reason
    assert registry.champion(NAME) == champion


def test_rows_of_the_ladder_are_chosen_by_name(convnet):
    result = convnet("--json", "--row", "activations only", command=["compare"])
    assert result.exit_code == 0, result.stderr
    assert [row["variant"] for row in json.loads(result.stdout)["rows"]] == [
        "float",
        "activations only",
    ]
    result = convnet("--json", "--row", "per chanel", command=["compare"])
    assert result.exit_code == 1
    (reason,) = json.loads(result.stdout)["reasons"]
    assert reason.startswith("row 'per chanel' is unknown: there are weights only, per channel; ")

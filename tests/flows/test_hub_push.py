"""Promoted releases pushed to a model hub: a real HTTP server that speaks its commit API."""

import json
import os
import subprocess
import sys
from hashlib import sha256
from types import SimpleNamespace

import pytest
import yaml
from hub_server import TOKEN, hub_server
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from dpq_core.checkpoint.exports import verify
from dpq_core.recipe import parse_recipe
from dpq_core.verdict.gates import Verdict
from dpq_core.verdict.standing import Metric
from infra.hub import HubError
from infra.registry import Registry
from infra.registry.tracking import tracking_store
from tasks.publish import pushed
from tasks.register import Registration
from tasks.support.hub_card import hub_card

RELEASE = "from flows.cli.main import main; main()"
PUSH = """
import sys
from pathlib import Path
from infra.hub import HubError, HubRepository
try:
    repository = HubRepository(sys.argv[1], sys.argv[2] == "private")
    repository.check()
    if len(sys.argv) > 3:
        print(repository.push(Path(sys.argv[3]), sys.argv[4], "a message"))
except HubError as error:
    sys.exit(str(error))
"""
CARD = "---\nlicense: mit\n---\n# A model\n"


@pytest.fixture
def hub():
    with hub_server() as served:
        yield served


def run(address, program, *arguments, **more):
    """A process of its own: huggingface_hub reads the address at import."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


def written(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    (folder / "README.md").write_text(CARD)
    (folder / ".lock").write_text("not of the release")
    return folder


def test_a_cut_push_goes_on_and_sends_no_finished_file_again(hub, tmp_path):
    address, state = hub
    contents = {name: name.encode() * 300_000 for name in ("a", "b", "c")}
    folder = written(tmp_path / "release", **contents)
    digests = {name: sha256(content).hexdigest() for name, content in contents.items()}
    state.cut = digests["b"]
    first = run(address, PUSH, "org/model", "private", folder, "main")
    assert first.returncode == 1
    last = first.stderr.strip().splitlines()[-1]
    assert last.startswith(f"org/model: the hub at {address}: Error while uploading")
    assert "'b.safetensors'" in last
    assert "403" in last
    assert state.attempts.count(digests["b"]) == 2  # cut, and tried again by huggingface_hub
    assert not state.commits
    assert sorted(state.received) == sorted(digests[name] for name in "ac")

    state.cut = None
    state.received.clear()
    second = run(address, PUSH, "org/model", "private", folder, "main")
    assert second.returncode == 0, second.stderr
    assert state.received == [digests["b"]]
    files = state.repositories["org/model"]["branches"]["main"]
    assert set(files) == {".gitattributes", "README.md", *(f"{n}.safetensors" for n in contents)}
    assert all(files[f"{name}.safetensors"] == content for name, content in contents.items())
    assert len(state.commits) == 1


def test_a_branch_holds_the_last_release_and_nothing_of_those_before(hub, tmp_path):
    address, state = hub
    for names in ({"a": b"1", "b": b"2"}, {"a": b"3"}):
        folder = written(tmp_path / "-".join(names), **names)
        for branch in ("main", "main-native"):
            pushed = run(address, PUSH, "org/model", "private", folder, branch)
            assert pushed.returncode == 0, pushed.stderr
            assert pushed.stdout.startswith(f"{address}/org/model/commit/")
    for files in state.repositories["org/model"]["branches"].values():
        assert set(files) == {".gitattributes", "README.md", "a.safetensors"}
        assert files["a.safetensors"] == b"3"


@pytest.mark.parametrize(
    ("repo", "changes", "said"),
    [
        ("org/model", {"HF_TOKEN": ""}, "HF_TOKEN, which is not set"),
        ("org/model", {"HF_TOKEN": "hf_other"}, "the hub at http://127.0.0.1"),
        ("org/a--b", {}, "registry.hub.repo: Cannot have -- or .. in repo_id: 'org/a--b'"),
        ("model", {}, "registry.hub.repo: model: write namespace/name"),
        ("org/public", {}, "org/public is public, and registry.hub.private is true"),
        ("org/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub at http://127.0.0.1:9"),
        ("org/model", {"HF_HUB_OFFLINE": "1"}, "offline mode"),
    ],
)
def test_what_is_found_before_any_work(hub, repo, changes, said):
    address, state = hub
    state.repositories["org/public"] = {"private": False, "branches": {"main": {}}}
    environment = {"HF_ENDPOINT": address, **changes}
    checked = run(environment.pop("HF_ENDPOINT"), PUSH, repo, "private", **environment)
    assert checked.returncode == 1
    assert said in checked.stderr
    assert "Traceback" not in checked.stderr
    assert set(state.repositories) == {"org/public"}


def test_a_token_that_only_reads_is_refused(hub):
    address, state = hub
    state.role = "read"
    assert "HF_TOKEN of tester only reads" in run(address, PUSH, "org/model", "private").stderr


def release(address, content, folder, **gates):
    """Of the quickstart model; what `dpq release --json` prints, and its process."""
    hub = {"repo": "org/quickstart", "private": False}
    changes = {
        "registry": {"name": "hub-tests", "hub": hub},
        "export": ["compressed-tensors"],
        "gates": {"perplexity_increase": 10, **gates},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(content | changes))
    done = run(address, RELEASE, "release", recipe, "--json")
    return (json.loads(done.stdout) if done.stdout.startswith("{") else None), done


def test_releases(hub, content, services_home, tmp_path):
    """Rejected: not pushed. Promoted, and the hub takes no commit: said so, and the champion
    stands. Again: the hub has it, and no large file was sent twice."""
    address, state = hub
    told, done = release(address, content, tmp_path, perplexity_increase=1e-6)
    assert told["verdict"] == "rejected", done.stderr
    assert told["hub"] is None
    assert not state.repositories

    state.refuse_commits = True
    told, done = release(address, content, tmp_path)
    assert told["verdict"] == "error"
    last = done.stderr.strip().splitlines()[-1]
    assert "of hub-tests is promoted, and the hub does not show it: org/quickstart" in last
    assert "run again when it can" in last
    registry = Registry(tracking_store(services_home)[0])
    version = registry.champion("hub-tests")
    assert f"version {version} of hub-tests" in last

    state.refuse_commits = False
    told, done = release(address, content, tmp_path)
    assert told["verdict"] == "promoted", done.stderr
    assert told["hub"].startswith(f"{address}/org/quickstart/commit/")
    assert len(state.attempts) == len(set(state.attempts)) == 2
    assert [branch for _, branch, _ in state.commits] == ["main-native", "main"]
    assert version == told["model_version"] == registry.champion("hub-tests")
    assert registry.tags("hub-tests", version)["hub"] == told["hub"]
    check_pushed(state.repositories["org/quickstart"]["branches"], told, tmp_path)


def check_pushed(branches, told, root):
    for branch, manifest in {"main": "export.json", "main-native": "dpq.json"}.items():
        folder = root / branch
        for name, data in branches[branch].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        assert (folder / manifest).is_file()
        verify(folder)
    card = ModelCard.load(root / "main" / "README.md")
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results["perplexity_token"].metric_type == "perplexity"
    for name in ("perplexity_token", "divergence", "top1_agreement"):
        assert results[name].metric_value == told["metrics"][name]["candidate"]


@pytest.mark.parametrize("verdict", ["rejected", "inspected", "withheld", "error"])
def test_only_what_is_promoted_is_pushed(content, verdict):
    registration = Registration("any", 3, 2, Verdict(verdict, (), {}))
    assert pushed(to_hub(content), None, None, registration, None, []) is None


def test_what_is_no_champion_any_more_is_not_pushed(content):
    registration = Registration("any", 3, 2, Verdict("promoted", (), {}))
    registry = SimpleNamespace(champion=lambda name: 4)
    with pytest.raises(HubError, match="does not show it: version 4 took its place meanwhile"):
        pushed(to_hub(content), None, registry, registration, None, [])


def test_a_hub_makes_no_other_release(content):
    assert to_hub(content).digest == parse_recipe(content).digest


def to_hub(content):
    registry = {**content["registry"], "hub": {"repo": "org/model"}}
    return parse_recipe(content | {"registry": registry})


METRICS = {
    "perplexity_token": Metric("perplexity_token", 9.0, 9.5, 0.5),
    "accuracy.piqa": Metric("acc", 60.0, 59.0, -1.0),
    "divergence": Metric("nats a token", 0.0, 0.01, 0.01),
    "flips": Metric("percent of answers", 0.0, float("nan"), None),
    "accuracy_average": Metric("acc", 60.0, None, None, wrong="piqa failed"),
}


def test_the_card_of_a_hub(content):
    dataset = {"path": "json", "data_files": "/home/somebody/wiki.jsonl"}
    evaluation = {"perplexity": {"dataset": dataset}, "suites": ["piqa"]}
    model = {"id": "org/base"}
    recipe = parse_recipe(content | {"model": model, "evaluation": evaluation})
    card = hub_card(CARD, recipe, "a" * 40, METRICS)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "mit"
    assert front["base_model"] == "org/base"
    assert front["base_model_relation"] == "quantized"
    name, results = model_index_to_eval_results(front["model-index"])
    assert name == "flow-tests"
    found = {r.metric_name: (r.metric_value, r.dataset_type, r.dataset_name) for r in results}
    assert found == {
        "perplexity_token": (9.5, "json", "wiki.jsonl"),
        "divergence": (0.01, "json", "wiki.jsonl"),
        "accuracy.piqa": (59.0, "piqa", "piqa"),
    }
    assert "somebody" not in card
    local = yaml.safe_load(hub_card(CARD, recipe, None, METRICS).split("---\n")[1])
    assert not {"base_model", "base_model_relation"} & set(local)

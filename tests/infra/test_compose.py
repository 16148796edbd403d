"""docker-compose.yml: the specification, and what we ask of a team's services beyond it."""

import json
import re

import pytest
import yaml
from compose_spec import PyCompose

from infra import compose
from infra.compose import COMPOSE_FILE, ComposeError
from infra.orchestration.deployments import POOL, QUEUES

REPOSITORY = COMPOSE_FILE.parent
SECRETS = [
    line.removesuffix("=")
    for line in (REPOSITORY / ".env.example").read_text().splitlines()
    if not line.startswith("#")
]
PLANTED = {name: f"planted-{number}" for number, name in enumerate(SECRETS)}
SERVICES = compose.read(PLANTED)["services"]
ONCE = {"buckets", "migrate", "deploy"}
PINNED = re.compile(r"[:@](?!latest)[\w.-]*\d+\.\d+[\w.-]*$")
SECRET_NAME = re.compile(r"PASSWORD|SECRET|KEY$|KEY_ID|AUTH_STRING|DOCKET_URL")


def stages():
    """The Dockerfile's stages: name → its lines, continued ones joined."""
    text = (REPOSITORY / "infra" / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = lines = []
        if line.strip() and not line.startswith("#"):
            lines.append(line)
    return found


def test_the_file_is_what_the_specification_says():
    content = compose.read(PLANTED)
    parsed = PyCompose.from_json(json.dumps(content))
    parsed.validate()
    assert set(parsed.service_names()) == set(SERVICES)
    content["services"]["redis"]["comand"] = []
    with pytest.raises(ValueError, match="comand"):
        PyCompose.from_json(json.dumps(content))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_watched_restarted_and_limited(name):
    about = SERVICES[name]
    assert about["restart"] == ("on-failure" if name in ONCE else "unless-stopped")
    assert set(about["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    if name not in ONCE:
        assert {"test", "interval", "timeout", "retries"} <= set(about["healthcheck"])


@pytest.mark.parametrize("name", SERVICES)
def test_nothing_is_published_beyond_loopback_or_runs_with_more_rights_than_it_needs(name):
    about = SERVICES[name]
    assert all(port.startswith("127.0.0.1:") for port in about.get("ports", []))
    assert not {"network_mode", "privileged", "pid", "env_file", "entrypoint"} & set(about)
    if "build" not in about:
        assert PINNED.search(about["image"])
        assert about["user"] not in ("root", "0")


@pytest.mark.parametrize("name", SERVICES)
def test_images_of_ours_are_built_from_a_stage_that_exists(name):
    if "build" in SERVICES[name]:
        assert SERVICES[name]["build"]["dockerfile"] == "infra/docker/Dockerfile"
        assert SERVICES[name]["build"]["target"] in stages()


@pytest.mark.parametrize("name", stages())
def test_images_are_pinned_and_do_not_run_as_root(name):
    lines = stages()[name]
    assert PINNED.search(lines[0].split()[1])
    installed = [line for line in lines if "pip install" in line]
    assert all(re.search(r"pip install -c \S*constraints\.txt ", line) for line in installed)
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert lines[-1] == f"USER {user}"
    assert user.split(":")[0] not in ("root", "0")


def test_what_an_image_installs_by_name_is_pinned():
    pinned = {line.split("==")[0] for line in (REPOSITORY / "constraints.txt").open()}
    (line,) = [line for line in stages()["services"] if "pip install" in line]
    names = [re.sub(r"\[.*\]", "", word.strip('"')) for word in line.split()[5:]]
    assert len(names) == 5
    assert set(names) <= pinned


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_has_no_default(name):
    others = {key: value for key, value in PLANTED.items() if key != name}
    for missing in (others, {**others, name: ""}):
        with pytest.raises(ComposeError, match=f"{name} is empty: set {name}"):
            compose.read(missing)


@pytest.mark.parametrize("name", SERVICES)
def test_what_looks_like_a_secret_comes_from_the_environment(name):
    secret = {
        key: value
        for key, value in SERVICES[name].get("environment", {}).items()
        if SECRET_NAME.search(key)
    }
    assert all("planted-" in value for value in secret.values())
    command = json.dumps(SERVICES[name]["command"])
    assert "planted-" not in command  # others on the machine see it


def test_the_workers_take_the_queues_that_dpq_deploy_makes():
    commands = [about["command"] for name, about in SERVICES.items() if name.startswith("worker")]
    assert {command[command.index("--work-queue") + 1] for command in commands} == set(QUEUES)
    assert {command[command.index("--pool") + 1] for command in commands} == {POOL}
    assert {name for name, about in SERVICES.items() if about.get("profiles")} == {
        "worker-gpu",
        "worker-gaudi",
    }


def test_services_start_after_what_they_depend_on():
    order = [service.name for service in compose.services(compose.read(PLANTED), ("gpu",))]
    assert set(order) == set(SERVICES) - {"worker-gaudi"}
    for name in order:
        for other, about in SERVICES[name].get("depends_on", {}).items():
            assert order.index(other) < order.index(name)
            ended = about["condition"] == "service_completed_successfully"
            assert ended == (other in ONCE)


@pytest.mark.parametrize(
    ("written", "variables", "read"),
    [
        ("a ${X} b", {"X": "1"}, "a 1 b"),
        ("${X:-two}", {}, "two"),
        ("${X:-two}", {"X": ""}, "two"),
        ("${X:-two}", {"X": "3"}, "3"),
        ("${X:?set X}/${Y:-}", {"X": "3"}, "3/"),
        ("$$X ${X}", {"X": "3"}, "$X 3"),
    ],
)
def test_variables_are_put_in_as_compose_does(tmp_path, written, variables, read):
    path = tmp_path / "compose.yml"
    path.write_text(yaml.safe_dump({"key": [written]}))
    assert compose.read(variables, path) == {"key": [read]}

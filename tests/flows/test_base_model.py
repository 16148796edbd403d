"""A release of another model than the champion's does not take its alias without being told to."""

import pytest

from infra.registry import BASE_MODEL, Registry
from infra.registry.tracking import tracked_run, tracking_store
from tasks.register import Base, BaseModelError


@pytest.fixture
def champion(services_home, request):
    """A registry, a registered model, and its champion, which was made of org/theirs."""
    uri, artifacts = tracking_store(services_home)
    registry, name = Registry(uri), f"base-{request.node.name[:80]}".replace("[", "-").rstrip("]")
    with tracked_run(uri, "base models", "release", {}, artifacts) as run:
        about = {BASE_MODEL: "org/theirs", "model_digest": "d1"}
        version = registry.register(name, artifacts.as_uri(), run.run_id, about)
    registry.promote(name, version)
    return registry, name, version


@pytest.mark.parametrize(
    "base",
    [Base("org/theirs", "d2"), Base("/a/copy", "d1"), Base("org/ours", "d2", any=True)],
)
def test_the_same_model_or_one_that_may_be_another(champion, base):
    assert base.obstacle(*champion) is None


def test_another_model(champion):
    registry, name, version = champion
    base = Base("org/ours", "d2")
    assert base.obstacle(registry, name, None) is None
    with pytest.raises(BaseModelError) as caught:
        base.check(registry, name, version)
    for part in (name, "org/theirs", "org/ours", "registry.any_base_model: true"):
        assert part in str(caught.value)


def test_a_release_says_so_before_any_work(champion, dpq, tmp_path):
    registry, name, version = champion
    settings = [f"registry.name={name}", f"execution.store={tmp_path / 'store'}"]
    result = dpq("release", *(word for each in settings for word in ("--set", each)))
    assert result.exit_code == 1
    assert "was made of org/theirs" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "store" / "statistics").exists()
    assert (registry.champion(name), len(list(registry.versions(name)))) == (version, 1)


def test_a_release_that_is_told_to_takes_the_alias(champion, dpq, brief):
    registry, name, _ = champion
    settings = [f"registry.name={name}", "registry.any_base_model=true", brief]
    result = dpq("release", *(word for each in settings for word in ("--set", each)))
    assert result.exit_code == 0, result.stderr
    assert registry.champion(name) == 2
    assert registry.base_model(name, 2).endswith("quickstart/model")

"""Whose a team's home is: nobody's folder is written to, or deleted from."""

import pytest

from infra import compose
from infra.team import TeamError, down, up


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def somebody_s(tmp_path):
    for name in ("tmp", "logs", "work", "letters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text(name)
    return tmp_path


def test_somebody_s_folder_loses_nothing(somebody_s, monkeypatch):
    for line in (compose.COMPOSE_FILE.parent / ".env.example").read_text().splitlines():
        if line.endswith("="):
            monkeypatch.setenv(line[:-1], "secret")
    monkeypatch.setattr("infra.team._check_ports", lambda _: None)
    monkeypatch.setattr("infra.team.missing", lambda: [])
    before = contents(somebody_s)
    for use in (lambda: down(somebody_s, volumes=True), lambda: up(somebody_s)):
        with pytest.raises(TeamError, match=r"not made by `up` \(letters is in it, and no"):
            use()
    down(somebody_s)
    assert contents(somebody_s) == before


def test_a_home_of_ours_goes_and_what_lies_beside_it_stays(tmp_path):
    for name in ("tmp", "postgres"):  # of a release that did not mark it
        (tmp_path / "home" / name).mkdir(parents=True)
    down(tmp_path / "home", volumes=True)
    assert not (tmp_path / "home").exists()
    down(tmp_path / "home", volumes=True)
    (tmp_path / "home" / "postgres").mkdir(parents=True)
    (tmp_path / "home" / ".dpq-team").touch()
    (tmp_path / "home" / "notes.txt").touch()
    down(tmp_path / "home", volumes=True)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["notes.txt"]

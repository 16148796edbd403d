"""A folder that MLflow can load, whoever makes it one and however often."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from infra.registry.flavor import CODE, FILES, MODEL, TextModel, write_flavor


@pytest.fixture
def model(tmp_path):
    package = tmp_path / "given"
    (package / "__pycache__").mkdir(parents=True)
    (package / "__pycache__" / "loader.pyc").write_bytes(b"of this machine")
    (package / "loader.py").write_text("one = 1\n")
    return TextModel("given.loader", package, ["pyyaml"], {"most": 3, "warmth": 0.5})


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint"
    made.mkdir()
    return made


def written(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_several_at_once_write_it_once(folder, model):
    with ThreadPoolExecutor(8) as runs:
        list(runs.map(lambda _: write_flavor(folder, model), range(8)))
    assert written(folder) == sorted(FILES)
    assert [path.name for path in (folder / CODE).rglob("*")] == ["given", "loader.py"]
    before = (folder / MODEL).read_text()  # it has a number of its own each time
    write_flavor(folder, model)
    assert (folder / MODEL).read_text() == before
    assert f"pyyaml=={yaml.__version__}" in (folder / "requirements.txt").read_text().split()


@pytest.mark.parametrize("gone", FILES)
def test_what_is_not_whole_or_of_other_code_is_written_anew(folder, model, gone):
    write_flavor(folder, model)
    before = (folder / MODEL).read_text()  # it has a number of its own each time
    if gone == CODE:
        (model.package / "loader.py").write_text("one = 2\n")
    else:
        (folder / gone).unlink()
    write_flavor(folder, model)
    assert written(folder) == sorted(FILES)
    assert (folder / CODE / "given" / "loader.py").read_bytes() == (
        (model.package / "loader.py").read_bytes()
    )
    assert (folder / MODEL).read_text() != before

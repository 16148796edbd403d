"""Large tensors are cut into files by rows, and come back as they were."""

import pytest
import torch

from tasks.support import tensor_files
from tasks.support.tensor_files import load, saver

GIVEN = {
    "hessian_sum": torch.arange(50.0).view(10, 5),
    "tokens": torch.tensor(7),
    "odd/name": torch.arange(33, dtype=torch.int64).view(11, 3),
}


@pytest.mark.parametrize(
    ("part", "files"),
    [
        (1 << 20, 1),
        (100, 1 + 2 + 3),  # 10 rows of 20 bytes: 5 at a time; 11 of 24: 4
        (10, 1 + 10 + 11),  # less than a row
    ],
)
def test_as_they_were(tmp_path, monkeypatch, part, files):
    monkeypatch.setattr(tensor_files, "_PART", part)
    saver(GIVEN)(tmp_path)
    assert len(list(tmp_path.iterdir())) == files
    found = load(tmp_path)
    assert found.keys() == GIVEN.keys()
    for name, tensor in GIVEN.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)

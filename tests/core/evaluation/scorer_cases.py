"""The scorer on a CUDA device, beside whole models on the CPU.

python -m pytest tests/core/evaluation/scorer_cases.py
"""

import pytest
import torch
from test_subjects import RUN, check_answers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("name", RUN)
def test_answers_are_the_whole_model_s(name, resident, tmp_path):
    check_answers(name, tmp_path, "cuda", resident)

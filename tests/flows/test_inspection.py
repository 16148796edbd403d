"""A model to quantize is inspected whatever was done with its folder before."""

import pytest
from architectures import REFUSED, random_model

from dpq_core.model.anatomy import ArchitectureError
from dpq_core.recipe import ModelSection
from infra.store import Store
from tasks.support.model import inspect, inspect_any


def test_what_was_only_measured_is_proven_when_it_is_quantized(tmp_path):
    config, module = REFUSED["GPT-2"]
    random_model(config).save_pretrained(tmp_path / "model")
    store, model = Store(tmp_path / "store"), str(tmp_path / "model")
    assert inspect_any(model, store).id == model
    with pytest.raises(ArchitectureError, match=module):
        inspect(ModelSection(id=model), store)

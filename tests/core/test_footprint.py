from dataclasses import replace

import pytest

from dpq_core.footprint import footprint, layer_bytes
from dpq_core.plan import plan_layers
from dpq_core.recipe import CalibrationSection
from dpq_core.scheme import Scheme
from dpq_core.streaming import StreamedModel


@pytest.fixture(scope="module")
def plan(quickstart_model):
    return plan_layers(StreamedModel(quickstart_model), Scheme())


def calibration(**changes):
    return CalibrationSection(dataset={"path": "python_docs"}, **changes)


def test_each_part_grows_with_what_it_is_made_of(plan):
    few, many = (footprint(plan, calibration(samples=samples, batch_size=4)) for samples in (8, 16))
    hidden = 8 * calibration().sequence_length * plan.layers[0].features * 2
    assert many.block - few.block == hidden
    assert many.disk == few.disk
    assert many.layer == few.layer == max(map(layer_bytes, plan.layers))


def test_a_layer_s_weight_or_its_hessian_decides(plan):
    layer = plan.layers[0]
    tall, wide = (replace(layer, rows=r, features=f) for r, f in ((4096, 512), (512, 4096)))
    assert layer_bytes(tall) == 4 * (2 * 512**2 + 10 * 512 * 4096)
    assert layer_bytes(wide) == 4 * (4 * 4096**2 + 512 * 4096)


def test_fewer_steps_take_less(plan):
    shapes = [
        layer_bytes(replace(plan.layers[0], scheme=scheme))
        for scheme in (Scheme(method="none"), Scheme(bits=8), Scheme())
    ]
    assert shapes == sorted(shapes)

"""How much there is to calibrate on: asked for, got, and for each input."""

import pytest

from dpq_core.calibration.required_tokens import CalibrationTokens
from dpq_core.data.texts import DataError
from dpq_core.model.plan import PlannedLayer
from dpq_core.recipe import CalibrationSection, load_recipe
from dpq_core.recipe.scheme import Scheme

SECTION = CalibrationSection(dataset={"path": "python_docs"}, samples=128, sequence_length=2048)
WEBQUESTIONS = 39_424  # tokens, by Llama's tokenizer


def layers(*features, **scheme):
    return [PlannedLayer(f"l{n}", 0, "l0", 8, n, Scheme(**scheme)) for n in features]


def test_webquestions_for_llama_3_8b_are_too_few():
    tokens = CalibrationTokens.of_plan(SECTION, WEBQUESTIONS, layers(4096, 14336))
    assert tokens == CalibrationTokens(262_144, WEBQUESTIONS, 14336)
    said = "39,424 of 262,144 tokens asked for, 2.75 for each of the widest layer's 14,336 inputs"
    assert tokens.line == said
    with pytest.raises(DataError) as caught:
        tokens.check(SECTION.required_tokens_per_input)
    for part in (said, "calibration.required_tokens_per_input is 4", "calibration.dataset"):
        assert part in str(caught.value)
    tokens.check(2.75)


@pytest.mark.parametrize("widest", [11008, 14336, 28672, 53248])  # Llama 2 7B, 3 8B, 70B, 405B
def test_the_usual_windows_are_enough_for_every_llama(widest):
    CalibrationTokens.of_plan(SECTION, 262_144, layers(widest)).check(4.0)


def test_all_that_was_asked_for_may_be_too_little():
    with pytest.raises(DataError, match=r"give more calibration\.samples"):
        CalibrationTokens(1024, 1024, 640).check(4.0)


@pytest.mark.parametrize(
    "scheme",
    [
        {"method": "rtn", "rounding": "nearest"},
        {"bits": 8},
        {"method": "none", "inner": "none", "activations": "none"},
    ],
)
def test_codes_that_no_hessian_chooses_need_none(scheme):
    tokens = CalibrationTokens.of_plan(SECTION, 2048, layers(14336, **scheme))
    assert tokens.per_input is None
    assert tokens.line == "2,048 of 262,144 tokens asked for"
    tokens.check(4.0)


@pytest.mark.parametrize(
    "scheme",
    [
        {"rounding": "nearest"},
        {"method": "rtn"},
        {"method": "rtn", "rounding": "nearest", "scale_search": "hessian"},
    ],
)
def test_codes_that_a_hessian_chooses_need_tokens(scheme):
    assert CalibrationTokens.of_plan(SECTION, 4096, layers(4096, **scheme)).per_input == 1


def test_the_shipped_recipes_require_what_everybody_does(quickstart_model):
    for path in sorted(quickstart_model.parents[1].glob("*.yaml")):
        if not path.stem.startswith("convnet"):
            assert load_recipe(path).calibration.required_tokens_per_input == 4, path

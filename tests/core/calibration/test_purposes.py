"""Windows that Hessians are counted on, beside others that scales are counted on."""

import pytest
import torch

from dpq_core.calibration.data_sets import data_sets
from dpq_core.calibration.statistics import (
    InputRounding,
    TokenWeights,
    block_passes,
    calibrate_block,
)
from dpq_core.data.texts import DataError
from dpq_core.model.inputs import apart, batches_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe import CalibrationSection
from dpq_core.recipe.scheme import Scheme


def tokens(seed, windows):
    return torch.randint(256, (windows, 8), generator=torch.Generator().manual_seed(seed))


HESSIANS, SCALES = tokens(0, 8), tokens(1, 6)
BOTH = {"hessians": HESSIANS, "scales": SCALES}
SECTION = CalibrationSection(dataset={"path": "python_docs"}, batch_size=4)
WEIGHTS = TokenWeights.of(SECTION)


@pytest.fixture(scope="module")
def stream(quickstart_model):
    return StreamedModel(quickstart_model)


def calibrated(stream, inputs, rounding, advance=False):
    batches = stream.begin(inputs)
    return calibrate_block(stream, 0, batches, rounding, WEIGHTS, advance), batches


@pytest.mark.parametrize("hessian_inputs", ["bf16", "fp8"])
def test_each_is_counted_on_its_own_windows(stream, hessian_inputs):
    section = SECTION.model_copy(update={"hessian_inputs": hessian_inputs})
    rounding = InputRounding.of(Scheme(), section)
    found, _ = calibrated(stream, apart(BOTH, 4), rounding)
    of_scales, _ = calibrated(stream, batches_of(SCALES, 4), rounding)
    alone, _ = calibrated(stream, batches_of(HESSIANS, 4), rounding)
    same = []
    for name, each in found.items():
        assert torch.equal(each.magnitudes, of_scales[name].magnitudes)
        assert not torch.equal(each.magnitudes, alone[name].magnitudes)
        assert each.tokens == HESSIANS.numel()
        same.append(torch.equal(each.hessian_sum, alone[name].hessian_sum))
    assert all(same) == (hessian_inputs == "bf16")  # else inputs are rounded by the others' scale


def test_all_windows_go_on_to_the_next_block(stream):
    rounding = InputRounding.of(Scheme(), SECTION)
    _, batches = calibrated(stream, apart(BOTH, 4), rounding, advance=True)
    expected = stream.begin(batches_of(torch.cat([HESSIANS, SCALES]), 4))
    with stream.block(0):
        stream.advance(expected)
    hidden = torch.cat([batch.hidden for batch in batches])
    assert torch.equal(hidden, torch.cat([batch.hidden for batch in expected]))
    assert [batch.purpose for batch in batches] == ["hessians"] * 2 + ["scales"] * 2
    assert all(set(batch.inputs) == {"input_ids"} for batch in batches)


@pytest.mark.parametrize(
    "scheme", [Scheme(), Scheme(activations="dynamic")], ids=lambda s: s.activations
)
def test_unseen_windows_are_in_no_sum_and_their_tokens_kept(stream, scheme):
    rounding, unseen = InputRounding.of(scheme, SECTION), tokens(2, 2)
    found, batches = calibrated(
        stream, apart({"both": HESSIANS, "unseen": unseen}, 4), rounding, True
    )
    alone, _ = calibrated(stream, batches_of(HESSIANS, 4), rounding)
    assert [batch.purpose for batch in batches] == ["both", "both", "unseen"]
    whole, _ = calibrated(stream, batches_of(torch.cat([HESSIANS, unseen]), 4), None)
    for name, each in found.items():
        assert each.tokens == alone[name].tokens == HESSIANS.numel()
        assert torch.equal(each.hessian_sum, alone[name].hessian_sum)
        assert torch.equal(each.magnitudes, alone[name].magnitudes)
        assert alone[name].unseen is None
        x = each.unseen.float()
        assert x.shape == (unseen.numel(), len(each.hessian_sum))
        counted = 2 * x.T @ x + each.hessian_sum  # what H would be with them
        assert torch.dist(counted, whole[name].hessian_sum) < 0.05 * whole[name].hessian_sum.norm()


def test_no_more_than_some_tokens_of_an_unseen_window_are_kept(stream, monkeypatch):
    monkeypatch.setattr("dpq_core.calibration.statistics.UNSEEN", 3)
    found, _ = calibrated(stream, apart({"both": HESSIANS, "unseen": tokens(2, 2)}, 4), None)
    every, _ = calibrated(
        stream, apart({"both": HESSIANS, "unseen": tokens(2, 2)[:, [0, 2, 5]]}, 4), None
    )
    name = next(
        name for name in found if name.endswith("0.self_attn.q_proj")
    )  # of embeddings alone
    assert len(found[name].unseen) == 6
    assert torch.equal(found[name].unseen, every[name].unseen)


def test_an_input_that_scales_never_reach_is_named(stream):
    batches = stream.begin(apart(BOTH, 4))
    with block_passes(stream, 0, None, WEIGHTS) as passes:
        magnitudes = passes.magnitudes(batches)
        name = max(magnitudes)
        magnitudes[name].zero_()
        with pytest.raises(DataError, match=f"none of its tokens reaches {name}"):
            passes.statistics(batches, magnitudes, advance=False)


def test_the_report_names_all_data_sets():
    about = {"calibration": {"scale_tokens": 38912}}
    section = CalibrationSection(
        dataset={"path": "json", "data_files": "c4.jsonl"},
        mixed_in=[{"path": "chat", "messages_column": "messages", "share": 0.25}],
        activations={"dataset": {"path": "questions"}},
    )
    assert data_sets(section, about) == {
        "data": "c4.jsonl, split train, 96 windows;"
        " chat, split train, 'messages' by the chat template, 32 windows",
        "activations' scales from": "questions, split train, 38,912 tokens",
    }
    assert data_sets(SECTION, about) == {"data": "python_docs, split train"}

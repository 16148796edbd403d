"""What `methods_table.py` measures is what the product measures."""

import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from methods_model import FIRSTS, Subject, Walk, full_name, original_statistics, quantize_model
from methods_rows import IDEAS, ROWS, row
from methods_score import Suites, reference, score_suites, score_windows
from methods_suites import arrays_of
from methods_table import wanted
from methods_transforms import transform
from reference_harness import evaluate_suite
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from dpq_core.calibration.statistics import InputRounding, TokenWeights, calibrate_block
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites
from dpq_core.model.inputs import batches_of
from dpq_core.model.streaming import StreamedModel
from dpq_core.recipe.scheme import Scheme

SHARED = Path(__file__).parents[2].parent / "shared"
STORIES = SHARED / "models/stories-260k"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no {STORIES}")


@pytest.fixture(scope="module")
def stories():
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()


@pytest.fixture
def subject(stories):
    return Subject(copy.deepcopy(stories))


def windows(count, length=64, vocabulary=512, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator)


def gemma():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=16,
    )
    model = Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, -0.5, 1)
    return model


def test_statistics_are_the_product_s():
    stream = StreamedModel(STORIES)
    tokens, scheme = windows(6), Scheme()
    batches = stream.begin(batches_of(tokens, 3))
    rounding = InputRounding(scheme.inner_format, True, scheme)
    weights = TokenWeights(equal=True, first_share=0.125)
    theirs = calibrate_block(stream, 0, batches, rounding, weights, advance=True)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.bfloat16)
    ours = original_statistics(Subject(model), row("default"), tokens, 3)
    for name in (full_name(0, first) for first in FIRSTS):
        assert torch.equal(ours[name].magnitudes, theirs[name].magnitudes)
        torch.testing.assert_close(ours[name].hessian(), theirs[name].hessian())


def test_a_walk_goes_the_model_s_way(subject):
    for each in (subject, Subject(gemma())):
        tokens = windows(4)
        walk = Walk(each, tokens, 2)
        with torch.inference_mode():
            for index in range(each.blocks):
                walk.through(index, advance=True)
            last = each.model.model.norm(torch.cat(walk.hidden))
            whole = each.model.model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(last, whole)


def test_perplexity_is_the_product_s_and_divergence_kl_s_definition(subject):
    tokens = windows(3)
    old = reference(subject.model, tokens, 2)
    subject.linears[full_name(1, "mlp.down_proj")].weight.mul_(1.5)
    found = score_windows(subject.model, tokens, old, 1, 2)
    assert found.perplexity == pytest.approx(perplexity_token(subject.model, tokens, 2).value)
    with torch.inference_mode():
        new = subject.model(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
        before = (old.states[:, :-1] @ old.head.T).double().log_softmax(-1)
    divergence = (before.exp() * (before - new)).sum(-1).mean(1)
    assert found.divergence == pytest.approx(divergence.tolist(), rel=1e-3)
    agreement = (before.argmax(-1) == new.argmax(-1)).double().mean(1)
    assert found.agreement == pytest.approx(agreement.tolist())


@pytest.mark.parametrize("what", ["scaled q_proj o_proj gate_proj down_proj", "rotated values 0"])
@pytest.mark.parametrize("make", [gemma, None], ids=["gemma", "llama"])
def test_transformed_models_are_equivalent(subject, make, what):
    each, tokens = Subject(make()) if make else subject, windows(4)
    with torch.inference_mode():
        before = each.model(input_ids=tokens).logits
        sixteen = row("", {"inner": "none", "activations": "none", "method": "rtn"})
        weight = each.linears[full_name(0, "self_attn.v_proj")].weight.clone()
        transform(each, what, original_statistics(each, sixteen, tokens, 2))
        assert not torch.equal(weight, each.linears[full_name(0, "self_attn.v_proj")].weight)
        torch.testing.assert_close(
            each.model(input_ids=tokens).logits, before, atol=2e-4, rtol=1e-3
        )


def test_every_idea_comes_nearer_than_rounding_and_is_taken_back(subject):
    tokens, other = windows(16), windows(8, seed=1)
    old = reference(subject.model, other, 4)

    def divergence(each):
        small = each.scheme.model_copy(update={"group_size": 32})
        each = ROWS[each.name].__class__(**{**vars(each), "scheme": small})
        with subject.restored():
            original = None
            if each.propagation == "original" and not each.output_range:
                original = original_statistics(subject, each, tokens, 4)
            quantize_model(subject, each, tokens, 4, original, [])
            return np.mean(score_windows(subject.model, other, old, 1, 4).divergence)

    rounded = divergence(ROWS["rtn W4A8"])
    for each in IDEAS:
        if not each.transform:
            assert 0 < divergence(each) < rounded, each.name
    assert score_windows(subject.model, other, old, 1, 4).divergence == pytest.approx([0] * 8)


NAMES = "arc_challenge", "openbookqa", "winogrande", "lambada_openai", "boolq"


def test_suites_without_the_harness_have_its_answers(stories, tmp_path):
    """300 documents, of every kind: normed and plain choices, contexts that differ, greedy."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    with loaded_suites(NAMES, SuiteSources(mirror=SHARED / "data")) as suites:
        np.savez(
            tmp_path / "suites.npz",
            **arrays_of(stories, tokenizer, suites, dict.fromkeys(suites, 60)),
        )
        theirs = {
            name: evaluate_suite(stories, tokenizer, suite, limit=60).values
            for name, suite in suites.items()
        }
    stored = Suites.load(tmp_path / "suites.npz")
    for count, batch in ((60, 4096), (7, 512)):
        found = score_suites(stories, stored, dict.fromkeys(theirs, count), batch)
        assert found == {name: own[:count] for name, own in theirs.items()}


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text('{"row": "16 bits"}\n{"row": "default", "error": "out of memory"}\n')
    asked = SimpleNamespace(only=["16 bits", "default", "full:default"], quick=False, out=out)
    assert [each.name for each in wanted(asked)] == ["default", "full:default"]
    assert wanted(asked)[1].suites > wanted(asked)[0].suites

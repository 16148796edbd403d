"""Faults that perplexity and accuracy let pass, and divergence does not.

Both are means in which losses and gains cancel. On a text that the model was not trained on a
broken one can even score better: the stories' model on Python's documentation. The distance
between two models' predictions has no sign.
"""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dpq_core.checkpoint.native import load_model
from dpq_core.data import python_corpus
from dpq_core.evaluation.divergence import Divergence, by_request, divergence
from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.requests import Encoder, asked_of_windows
from dpq_core.evaluation.results import perplexity_scores, suite_scores
from dpq_core.evaluation.scorer import answers, last_states, score
from dpq_core.evaluation.scores import PERPLEXITY
from dpq_core.evaluation.subject import in_memory
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites
from dpq_core.evaluation.text_divergence import text_divergence
from dpq_core.recipe import GatesSection
from dpq_core.verdict.comparison import compare
from dpq_core.verdict.gates import judge

FOLDER = Path(__file__).parents[4] / "shared/models/stories-260k"
DOCUMENTS, LENGTH = 100, 128
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/models")


@cache
def original():
    return load_model(FOLDER)


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@cache
def windows():
    text = "\n\n".join(python_corpus.documents("validation"))[:200_000]
    ids = torch.tensor(tokenizer()(text, verbose=False).input_ids)
    return ids[: DOCUMENTS * LENGTH].view(DOCUMENTS, LENGTH)


def subject(model):
    return in_memory(copy.deepcopy(model))


def evaluation(model):
    """Perplexity of 100 windows, accuracy of 100 questions."""
    asked = list(chunks_of(asked_of_windows(windows())))
    found = answers(score(subject(model), asked), DOCUMENTS)
    with loaded_suites(["python_docs"], SuiteSources()) as suites:
        suite = suites["python_docs"]
        wanted = Encoder(tokenizer(), model.config).requests_of(suite, DOCUMENTS)
        scored = score(subject(model), list(chunks_of(wanted.asked)))
        of_suite = suite_scores(suite, answers(scored, wanted.count), limit=DOCUMENTS)
    return {PERPLEXITY: perplexity_scores(windows(), found), "python_docs": of_suite}


def apart(model):
    """Its divergence from the original."""
    chunks = list(chunks_of(asked_of_windows(windows())))
    parts, (before, after) = [], (subject(original()), subject(model))
    for chunk in chunks:
        (theirs,), (ours,) = last_states(before, [chunk]), last_states(after, [chunk])
        with head_tiles(before.stream) as p, head_tiles(after.stream) as q:
            each, rows = divergence(p, theirs.hidden, q, ours.hidden), ours.rows(chunk)
        parts.append((chunk.requests, Divergence(each.nats[rows], each.agree[rows])))
    return text_divergence(by_request(parts), windows(), tokenizer())


def scale_doubled(model):
    model.model.layers[3].self_attn.v_proj.weight.data *= 2


def layers_swapped(model):
    one, other = (model.model.layers[n].self_attn.k_proj for n in (2, 3))
    one.weight, other.weight = other.weight, one.weight


def row_zeroed(model):
    """Of a piece that stories have more often than this text."""
    weight = load_file(FOLDER / "model.safetensors").get("lm_head.weight")
    weight = model.model.embed_tokens.weight.data if weight is None else weight
    model.lm_head.weight = torch.nn.Parameter(weight.to(model.dtype).clone())
    model.lm_head.weight.data[tokenizer().convert_tokens_to_ids("▁was")] = 0


@pytest.mark.parametrize("fault", [scale_doubled, layers_swapped, row_zeroed])
def test_only_divergence_sees_it(fault):
    broken = copy.deepcopy(original())
    fault(broken)
    before, after = evaluation(original()), evaluation(broken)
    found = compare(before, after, divergence=apart(broken))
    usual, closer = GatesSection(), GatesSection(divergence=0.03)
    assert judge(found, {}, usual, None).verdict == "promoted"
    verdict = judge(found, {}, closer, None)
    assert verdict.verdict == "rejected"
    (reason,) = verdict.reasons
    assert reason.startswith("divergence: ")


def test_the_original_is_not_apart_from_itself():
    found = compare(evaluation(original()), evaluation(original()), divergence=apart(original()))
    assert judge(found, {}, GatesSection(divergence=1e-6), None).verdict == "promoted"

"""Scores of the forest against lm-evaluation-harness's own runner: real suites, real models."""

import dataclasses
from pathlib import Path

import pytest
import torch
from reference_harness import evaluate_suite
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpq_core.evaluation.forest import chunks_of
from dpq_core.evaluation.perplexity import perplexity_token
from dpq_core.evaluation.requests import Encoder, asked_of_windows
from dpq_core.evaluation.results import perplexity_scores, suite_scores
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites

SHARED = Path(__file__).parents[3].parent / "shared"
MODELS = ["stories-260k", "wiki-llama-12m"]
SUITES = {
    "hellaswag": 6,
    "lambada_openai": 8,
    "boolq": 4,
    "arc_easy": 6,
    "piqa": 6,
    "winogrande": 8,
    "arc_challenge": 6,
    "openbookqa": 6,
    "wikitext": 2,
}
pytestmark = pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason="the shared models and suites are not beside this"
)


def in_fp32(name):
    return AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32)


class Told:
    """What HFLM answers to each request, taken down while a suite is evaluated."""

    def __init__(self, monkeypatch):
        from lm_eval.models.huggingface import HFLM

        self.answers = []
        for kind in ("loglikelihood", "loglikelihood_rolling"):
            monkeypatch.setattr(HFLM, kind, self._telling(getattr(HFLM, kind)))

    def _telling(self, asked):
        def told(harness, requests, disable_tqdm=False):
            found = asked(harness, requests, disable_tqdm=True)
            self.answers = list(found)
            return found

        return told


def scored(subject, suite, tokenizer, limit, tokens=16_384):
    asked = Encoder(tokenizer, subject.stream.model.config).requests_of(suite, limit)
    chunks = list(chunks_of(asked.asked, tokens))
    return asked, answers(score(subject, chunks), asked.count)


def same(found, expected):
    """Log-likelihoods within 1e-4, relative; greedy flags equal."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        theirs, greedy = theirs if isinstance(theirs, tuple) else (theirs, ours[1])
        assert ours[0] == pytest.approx(theirs, rel=1e-4)
        assert ours[1] == greedy


@pytest.fixture(scope="module")
def suites():
    with loaded_suites(list(SUITES), SuiteSources(mirror=SHARED / "data")) as found:
        yield found


@pytest.mark.parametrize("name", MODELS)
def test_every_answer_is_the_harness_s(name, suites, monkeypatch):
    folder = SHARED / "models" / name
    tokenizer, told = AutoTokenizer.from_pretrained(folder), Told(monkeypatch)
    subject, model = subject_of(folder, dtype=torch.float32, resident=True), in_fp32(name)
    assert subject.unshared is None
    for suite in suites.values():
        limit = SUITES[suite.name]
        expected = evaluate_suite(model, tokenizer, suite, limit=limit)
        theirs = told.answers
        asked, found = scored(subject, suite, tokenizer, limit, tokens=600)
        same(found, theirs)
        scores = suite_scores(suite, found, asked.truncated, limit)
        assert (scores.documents, scores.parts) == (expected.documents, expected.parts)
        assert scores.values == pytest.approx(expected.values, rel=1e-4)
        assert (scores.weights, scores.metric) == (expected.weights, expected.metric)
        assert scores.truncated == expected.truncated


def test_five_examples_of_a_subject_are_shared(monkeypatch):
    folder, told = SHARED / "models/wiki-llama-12m", Told(monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    subject, model = subject_of(folder, dtype=torch.float32, resident=True), in_fp32(folder.name)
    with loaded_suites(["mmlu"], SuiteSources(mirror=SHARED / "data"), {"mmlu": 5}) as suites:
        few = {name: suites["mmlu"].tasks[name] for name in ("mmlu_anatomy", "mmlu_virology")}
        suite = dataclasses.replace(suites["mmlu"], tasks=few)
        expected = evaluate_suite(model, tokenizer, suite, limit=3)
        theirs = told.answers
        asked, found = scored(subject, suite, tokenizer, 3)
        same(found, theirs)
        scores = suite_scores(suite, found, asked.truncated, 3)
    assert (scores.values, scores.groups) == (expected.values, expected.groups)
    computed = sum(len(chunk) for chunk in chunks_of(asked.asked))
    assert computed < asked.harness_tokens / 2


def test_perplexity_is_that_of_whole_windows():
    folder = SHARED / "models/stories-260k"
    windows = torch.randint(3, 512, (5, 300), generator=torch.Generator().manual_seed(0))
    chunks = list(chunks_of(asked_of_windows(windows), 700))
    subject = subject_of(folder, dtype=torch.float32)
    found = perplexity_scores(windows, answers(score(subject, chunks), len(windows)))
    expected = perplexity_token(in_fp32("stories-260k"), windows, 2)
    assert found.values == pytest.approx(expected.values, rel=1e-5)
    assert (found.documents, found.weights) == (expected.documents, expected.weights)
    assert len(chunks) == 3

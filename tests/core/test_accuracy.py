import json
import math
import os
from pathlib import Path

import lm_eval
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from dpq_core import accuracy, corpus
from dpq_core.accuracy import SuiteError, check_suites, evaluate_suites
from dpq_core.suites import python_docs

SHARED = Path(__file__).parents[2].parent / "shared"
STORIES = SHARED / "models/stories-260k"
BYTES = ByT5Tokenizer(extra_ids=0)

SUITE = """
task: {name}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: answers
doc_to_target: right
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{more}
"""
NORM = "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}"


def tiny(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    """A folder of suites, and a function that writes one with its data."""

    def write(name, rights, more="", mtime=None):
        data = tmp_path / f"{name}.jsonl"
        rows = [
            {"question": f"{name} {i} is", "answers": ["a b c", "dd", "e e"], "right": right}
            for i, right in enumerate(rights)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if mtime is not None:
            os.utime(data, (mtime, mtime))
        (tmp_path / f"{name}.yaml").write_text(SUITE.format(name=name, data=data, more=more))

    return tmp_path, write


@torch.inference_mode()
def log_likelihood(model, context, continuation):
    """By hand, one request at a time, float64 from the logits on."""
    before, after = (BYTES(t, add_special_tokens=False).input_ids for t in (context, continuation))
    logits = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(logits[place, token].item() for place, token in zip(places, after, strict=True))


@pytest.mark.parametrize("batch_size", [1, 16])
def test_answers_are_those_of_a_loop_by_hand(batch_size):
    model = tiny()
    result = evaluate_suites(model, BYTES, ["python_docs"], limit=12, batch_size=batch_size)
    by_hand = []
    for question in python_docs.questions()[:12]:
        scores = [log_likelihood(model, question["context"], c) for c in question["choices"]]
        by_hand.append(float(scores.index(max(scores)) == question["gold"]))
    found = result["python_docs"]
    assert found.correct == by_hand
    assert found.value == pytest.approx(100 * sum(by_hand) / 12)
    assert (found.suite, found.metric, found.documents) == ("python_docs", "acc", 12)
    assert len(set(found.doc_hashes)) == 12


def test_two_models_differ_on_the_same_documents_and_nothing_is_cached():
    site = Path(lm_eval.__file__).parent
    before = {path for path in site.rglob("*") if "__pycache__" not in path.parts}
    first, second, again = (
        evaluate_suites(tiny(seed), BYTES, ["python_docs"], limit=40)["python_docs"]
        for seed in (0, 1, 0)
    )
    assert first.doc_hashes == second.doc_hashes
    assert first.correct != second.correct
    assert first == again
    assert {path for path in site.rglob("*") if "__pycache__" not in path.parts} == before


def test_a_broken_model_has_no_accuracy():
    model = tiny()
    model.lm_head.weight.data[5] = math.nan
    result = evaluate_suites(model, BYTES, ["python_docs"], limit=4)["python_docs"]
    assert math.isnan(result.value)
    assert all(math.isnan(answer) for answer in result.correct)


def test_questions_are_many_distinct_and_fair():
    questions = python_docs.questions()
    assert questions == python_docs.questions()
    assert 2000 <= len(questions) <= 2600
    text = "\n".join(corpus.documents("validation"))
    place = 0
    for question in questions:
        choices = question["choices"]
        assert len({" ".join(choice.split()) for choice in choices}) == 4
        whole = question["context"] + choices[question["gold"]]
        place = text.index(whole, place) + len(whole)  # in order, without overlap
        assert not question["context"][-1].isspace()
        assert all(choice[0].isspace() and not choice[-1].isspace() for choice in choices)
    shares = [sum(q["gold"] == place for q in questions) / len(questions) for place in range(4)]
    assert all(0.21 < share < 0.29 for share in shares)
    spread = [max(map(len, q["choices"])) - min(map(len, q["choices"])) for q in questions]
    assert sum(spread) / len(spread) < 2


def test_acc_norm_where_it_is_defined_and_wanted(folder):
    path, write = folder
    write("plain", [0, 1, 2])
    write("normed", [0, 1, 2], NORM)
    model = tiny()
    found = evaluate_suites(model, BYTES, ["plain", "normed"], suites_path=path)
    assert {suite: result.metric for suite, result in found.items()} == {
        "plain": "acc",
        "normed": "acc_norm",
    }
    found = evaluate_suites(model, BYTES, ["normed"], suites_path=path, prefer_norm=False)
    assert found["normed"].metric == "acc"


def test_a_group_is_the_mean_over_its_documents(folder):
    path, write = folder
    write("one", [0, 1, 2, 0])
    write("two", [1, 1])
    aggregate = "aggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    (path / "both.yaml").write_text("group: both\ntask: [one, two]\n" + aggregate)
    model = tiny()
    found = evaluate_suites(model, BYTES, ["one", "two", "both"], suites_path=path)
    assert found["both"].correct == found["one"].correct + found["two"].correct
    assert found["both"].doc_hashes == found["one"].doc_hashes + found["two"].doc_hashes
    (path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    with pytest.raises(SuiteError, match="no mean over its documents"):
        check_suites(["both"], path)


def test_changed_data_are_seen_even_when_their_time_is_not_changed(folder):
    path, write = folder
    model = tiny()
    answers = []
    for rights in ([0, 0], [1, 1], [2, 2]):
        write("suite", rights, mtime=1e9)
        answers.append(evaluate_suites(model, BYTES, ["suite"], suites_path=path)["suite"].value)
    assert sum(answers) == pytest.approx(100)  # each question is answered rightly exactly once


def test_few_shot_examples_are_used_or_refused(folder):
    path, write = folder
    write("shots", list(range(3)) * 5)
    write("never", [0, 1], "num_fewshot: 0")
    model = tiny()
    evaluate_suites(model, BYTES, ["shots"], suites_path=path, num_fewshot=2)
    with pytest.raises(SuiteError, match="'never' is zero-shot by definition"):
        evaluate_suites(model, BYTES, ["shots", "never"], suites_path=path, num_fewshot=2)


def test_no_output_but_on_stderr_and_the_tokenizer_is_left_alone(capfd, monkeypatch):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.pad_token = None
    evaluate_suites(tiny(), tokenizer, ["python_docs"], limit=4)
    assert capfd.readouterr().out == ""
    assert tokenizer.pad_token is None


def test_unknown_names_are_told_before_any_work(monkeypatch, folder):
    path, write = folder
    write("known", [0])
    monkeypatch.setattr(accuracy, "_packaged_index", lambda: {})  # 10 s
    check_suites(["python_docs", "known"], path)
    with pytest.raises(SuiteError, match="'python_doc' is unknown: did you mean python_docs"):
        check_suites(["known", "python_doc"], path)
    with pytest.raises(SuiteError, match="no such folder"):
        check_suites(["known"], path / "absent")
    (path / "broken.yaml").write_text("task: [known")
    with pytest.raises(SuiteError, match=r"broken\.yaml: not a suite definition"):
        check_suites(["known"], path)


def test_data_out_of_reach_name_the_way_out(folder):
    path, write = folder
    write("gone", [0])
    (path / "gone.jsonl").unlink()
    with pytest.raises(SuiteError, match=r"'gone': its data cannot be read.*into suites_path"):
        evaluate_suites(tiny(), BYTES, ["gone"], suites_path=path)


def test_a_suite_without_right_answers_is_refused(folder):
    path, write = folder
    write("rolling", [0])
    definition = (path / "rolling.yaml").read_text()
    definition = definition.replace("multiple_choice", "loglikelihood_rolling")
    definition = definition[: definition.index("metric_list")]
    definition = definition.replace("doc_to_target: right", "doc_to_target: question")
    (path / "rolling.yaml").write_text(definition)
    with pytest.raises(SuiteError, match="'rolling' has no accuracy: it is loglikelihood_rolling"):
        evaluate_suites(tiny(), BYTES, ["rolling"], suites_path=path)


def test_a_redefined_subject_leaves_the_group_its_others(folder):
    path, write = folder
    write("mmlu_anatomy", [0], "tag: mmlu_stem_tasks")
    manager, from_files = accuracy._index(["mmlu", "piqa"], path)
    names = set(accuracy._names(manager.task_index, "mmlu"))
    assert len([n for n in names if manager.task_index[n].kind.name == "TASK"]) == 57
    assert manager.task_index["mmlu_anatomy"].yaml_path == path / "mmlu_anatomy.yaml"
    assert from_files == {"mmlu"}


def test_the_harness_s_own_suites_are_known():
    check_suites(["hellaswag", "mmlu", "lambada_openai"])  # 10 s
    with pytest.raises(SuiteError, match="did you mean hellaswag"):
        check_suites(["helaswag"])
    with pytest.raises(SuiteError, match="'ai2_arc' is a label of several suites"):
        check_suites(["ai2_arc"])


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/models")
def test_a_tokenizer_that_opens_texts_still_opens_them():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(STORIES)
    harness = accuracy._harness(model, tokenizer, 4)
    assert harness.tok_encode("hello") == tokenizer("hello").input_ids
    assert harness.tok_encode("hello")[0] == tokenizer.bos_token_id
    assert accuracy._harness(tiny(), BYTES, 4).tok_encode("a") == [100]

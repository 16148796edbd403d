import json
import math
import os
from pathlib import Path

import lm_eval
import pytest
import torch
from scoring import evaluate_suite
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from dpq_core.data import python_corpus
from dpq_core.evaluation.open_texts import opened_by
from dpq_core.evaluation.suites import definitions, python_docs
from dpq_core.evaluation.suites.definitions import (
    SuiteError,
    SuiteSources,
    check_suites,
    loaded_suites,
)

SHARED = Path(__file__).parents[3].parent / "shared"
SHIPPED = Path(lm_eval.__file__).parent / "tasks"
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
ROLLING = """
task: rolling
include: {shipped}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {data}
training_split: null
validation_split: null
"""
NORM = "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}"


def tiny(seed=0, **changes):
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
        **changes,
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


def evaluate_suites(model, tokenizer, names, suites_path=None, num_fewshot=None, **keywords):
    prefer_norm = keywords.pop("prefer_norm", True)
    sources = SuiteSources(definitions=suites_path)
    with loaded_suites(names, sources, num_fewshot, prefer_norm) as suites:
        return {
            name: evaluate_suite(model, tokenizer, suite, **keywords)
            for name, suite in suites.items()
        }


def digests(names, suites_path=None, **keywords):
    with loaded_suites(names, SuiteSources(suites_path), **keywords) as suites:
        return [suite.digest for suite in suites.values()]


@torch.inference_mode()
def log_likelihood(model, context, continuation):
    """By hand, one request at a time, float64 from the logits on."""
    before, after = (BYTES(t, add_special_tokens=False).input_ids for t in (context, continuation))
    logits = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(before) + len(after) - 1)
    return sum(logits[place, token].item() for place, token in zip(places, after, strict=True))


def test_answers_are_those_of_a_loop_by_hand():
    model = tiny()
    result = evaluate_suites(model, BYTES, ["python_docs"], limit=12)
    by_hand, picks, margins = [], [], []
    for question in python_docs.questions()[:12]:
        scores = [log_likelihood(model, question["context"], c) for c in question["choices"]]
        by_hand.append(float(scores.index(max(scores)) == question["gold"]))
        picks.append(scores.index(max(scores)))
        margins.append(max(scores) - sorted(scores)[-2])
    found = result["python_docs"]
    assert found.values == by_hand
    assert found.picks == picks
    assert found.margins == pytest.approx(margins, rel=1e-4, abs=1e-4)
    assert found.value == pytest.approx(100 * sum(by_hand) / 12)
    assert (found.metric, set(found.parts), set(found.weights)) == ("acc", {"python_docs"}, {1})
    assert len(set(found.documents)) == 12


def test_two_models_differ_on_the_same_documents_and_nothing_is_cached():
    site = Path(lm_eval.__file__).parent
    before = {path for path in site.rglob("*") if "__pycache__" not in path.parts}
    first, second, again = (
        evaluate_suites(tiny(seed), BYTES, ["python_docs"], limit=40)["python_docs"]
        for seed in (0, 1, 0)
    )
    assert first.documents == second.documents
    assert first.values != second.values
    assert first == again
    assert {path for path in site.rglob("*") if "__pycache__" not in path.parts} == before


def test_a_broken_model_has_no_accuracy():
    model = tiny()
    model.lm_head.weight.data[5] = math.nan
    result = evaluate_suites(model, BYTES, ["python_docs"], limit=4)["python_docs"]
    assert math.isnan(result.value)
    assert all(math.isnan(answer) for answer in result.values)


def test_questions_are_many_distinct_and_fair():
    questions = python_docs.questions()
    assert questions == python_docs.questions()
    assert 2000 <= len(questions) <= 2600
    text = "\n".join(python_corpus.documents("validation"))
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
    assert found["both"].values == found["one"].values + found["two"].values
    assert found["both"].documents == found["one"].documents + found["two"].documents
    assert found["both"].parts == ["one"] * 4 + ["two"] * 2
    (path / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    with pytest.raises(SuiteError, match="no mean over its documents"):
        check_suites(["both"], SuiteSources(path))


def test_changed_data_are_seen_even_when_their_time_is_not_changed(folder):
    path, write = folder
    model = tiny()
    answers, names = [], set()
    for rights in ([0, 0], [1, 1], [2, 2]):
        write("suite", rights, mtime=1e9)
        answers.append(evaluate_suites(model, BYTES, ["suite"], suites_path=path)["suite"].value)
        names.update(digests(["suite"], path))
    assert sum(answers) == pytest.approx(100)  # each question is answered rightly exactly once
    assert len(names) == 3


def test_a_suite_s_digest_is_that_of_all_it_asks(folder, tmp_path_factory):
    path, write = folder
    write("suite", [0, 1, 2] * 2)
    (plain,) = digests(["suite"], path)
    assert digests(["suite"], path) == [plain]
    moved = tmp_path_factory.mktemp("moved")
    for file in path.iterdir():
        text = file.read_text().replace(str(path), str(moved))
        (moved / file.name).write_text(text)
    assert digests(["suite"], moved) == [plain]  # the same documents in another place
    others = [
        *digests(["suite"], path, num_fewshot={"suite": 1}),
        *digests(["suite"], path, num_fewshot={"suite": 2}),
    ]
    definition = path / "suite.yaml"
    definition.write_text(definition.read_text() + "description: Think.\n")
    others += digests(["suite"], path)
    assert len({plain, *others}) == 4


def test_few_shot_examples_are_used_or_refused(folder):
    path, write = folder
    write("shots", list(range(3)) * 5)
    write("never", [0, 1], "num_fewshot: 0")
    model = tiny()
    evaluate_suites(model, BYTES, ["shots"], suites_path=path, num_fewshot={"shots": 2})
    with pytest.raises(SuiteError, match="'never' is zero-shot by definition"):
        evaluate_suites(model, BYTES, ["shots", "never"], path, {"shots": 2, "never": 2})


def test_no_output_but_on_stderr_and_the_tokenizer_is_left_alone(capfd, monkeypatch):
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.pad_token = None
    evaluate_suites(tiny(), tokenizer, ["python_docs"], limit=4)
    assert capfd.readouterr().out == ""
    assert tokenizer.pad_token is None


def test_unknown_names_are_told_before_any_work(monkeypatch, folder):
    path, write = folder
    write("known", [0])
    monkeypatch.setattr(definitions, "_packaged_index", lambda: {})  # 10 s
    check_suites(["python_docs", "known"], SuiteSources(path))
    with pytest.raises(SuiteError, match="'python_doc' is unknown: did you mean python_docs"):
        check_suites(["known", "python_doc"], SuiteSources(path))
    with pytest.raises(SuiteError, match="no such folder"):
        check_suites(["known"], SuiteSources(path / "absent"))
    (path / "broken.yaml").write_text("task: [known")
    with pytest.raises(SuiteError, match=r"broken\.yaml: not a suite definition"):
        check_suites(["known"], SuiteSources(path))


def test_data_out_of_reach_name_the_way_out(folder):
    path, write = folder
    write("gone", [0])
    (path / "gone.jsonl").unlink()
    with pytest.raises(SuiteError, match=r"'gone': its data cannot be read.*data_mirror"):
        evaluate_suites(tiny(), BYTES, ["gone"], suites_path=path)


def test_word_perplexity_is_that_of_the_text_read_once(folder):
    path, _ = folder
    texts = ["one two three four", "a b", "long " * 30]
    data = path / "rolling.jsonl"
    data.write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    (path / "rolling.yaml").write_text(
        ROLLING.format(shipped=SHIPPED / "wikitext/wikitext.yaml", data=data)
    )
    model = tiny()
    found = evaluate_suites(model, BYTES, ["rolling"], path)["rolling"]
    by_hand = [-log_likelihood(model, "</s>", text) for text in texts]
    assert found.values == pytest.approx(by_hand, rel=1e-5)
    assert found.weights == [4, 2, 31]
    assert found.metric == "perplexity_word"
    assert found.value == pytest.approx(math.exp(sum(by_hand) / 37), rel=1e-5)


def test_a_suite_without_a_score_we_know_is_refused(folder):
    path, write = folder
    write("odd", [0])
    definition = (path / "odd.yaml").read_text().replace("multiple_choice", "loglikelihood_rolling")
    definition = definition[: definition.index("metric_list")]
    definition = definition.replace("doc_to_target: right", "doc_to_target: question")
    definition += "metric_list:\n  - {metric: bits_per_byte}\n"
    (path / "odd.yaml").write_text(definition)
    with pytest.raises(SuiteError, match="'odd' has neither accuracy nor word perplexity"):
        evaluate_suites(tiny(), BYTES, ["odd"], suites_path=path)


def test_requests_cut_to_the_window_are_counted(folder):
    path, write = folder
    write("suite", [0, 1])
    model = tiny()
    assert evaluate_suites(model, BYTES, ["suite"], path)["suite"].truncated == 0
    model.config.max_position_embeddings = 12
    assert evaluate_suites(model, BYTES, ["suite"], path)["suite"].truncated == 4  # "a b c", "e e"


def test_a_redefined_subject_leaves_the_group_its_others(folder, tmp_path):
    path, write = folder
    write("mmlu_anatomy", [0], "tag: mmlu_stem_tasks")
    sources = SuiteSources(path)
    manager, from_files = definitions._index(["mmlu", "piqa"], sources, tmp_path / "unused")
    names = set(definitions._members(manager.task_index, "mmlu"))
    assert len([n for n in names if manager.task_index[n].kind.name == "TASK"]) == 57
    assert manager.task_index["mmlu_anatomy"].yaml_path == path / "mmlu_anatomy.yaml"
    assert from_files == {"mmlu"}


def test_the_harness_s_own_suites_are_known():
    check_suites(["hellaswag", "mmlu", "lambada_openai"], SuiteSources())  # 10 s
    with pytest.raises(SuiteError, match="did you mean hellaswag"):
        check_suites(["helaswag"], SuiteSources())
    with pytest.raises(SuiteError, match="'ai2_arc' is a label of several suites"):
        check_suites(["ai2_arc"], SuiteSources())


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/models")
def test_a_tokenizer_that_opens_texts_still_opens_them():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    hello = tokenizer("hello").input_ids
    assert hello[0] == tokenizer.bos_token_id
    assert opened_by(tokenizer)(hello) == hello
    assert opened_by(BYTES)(BYTES("a").input_ids) == [100]


def none_left(path):
    (path / "kept.py").write_text("def none(rows):\n    return rows.filter(lambda row: False)\n")
    return "process_docs: !function kept.none\n"


@pytest.mark.parametrize("how", ["no rows", "an empty list", "none left"])
def test_a_suite_without_documents_is_called_so(folder, how):
    path, write = folder
    write("bare", [0] if how == "none left" else [])
    if how == "an empty list":
        (path / "bare.jsonl").write_text("[]")
    if how == "none left":
        (path / "bare.yaml").write_text(none_left(path) + (path / "bare.yaml").read_text())
    with pytest.raises(SuiteError) as caught:
        digests(["bare"], path)
    assert str(caught.value).startswith("suite 'bare': its data hold no documents: ")
    assert "hub" not in str(caught.value)


def test_a_definition_that_does_not_fit_its_data_is_no_matter_of_the_hub(folder):
    path, write = folder
    write("other", [0])
    definition = (path / "other.yaml").read_text()
    asks = definition.replace("doc_to_text: question", 'doc_to_text: "{{no_such_column.x}}"')
    (path / "other.yaml").write_text(asks)
    with pytest.raises(SuiteError, match="'other': its definition does not fit its data") as caught:
        digests(["other"], path)
    assert "hub" not in str(caught.value)

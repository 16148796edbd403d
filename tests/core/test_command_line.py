"""The same numbers as lm-evaluation-harness' own command line: same model, data and settings."""

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import lm_eval
import pytest
from reference_harness import evaluate_suite
from transformers import AutoTokenizer

from dpq_core.checkpoint.native import load_model
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites

SHARED = Path(__file__).parents[2].parent / "shared"
MODEL, DATA = SHARED / "models/wiki-llama-12m", SHARED / "data"
TASKS = Path(lm_eval.__file__).parent / "tasks"

BATCH_SIZE, LIMIT = 8, 40

# Written by hand, without `dpq_core.data.mirror`: the harness's definition, and the files of a
# split.
SUITES = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        {"train": "validation", "validation": "validation", "test": "test"},
    ),
    "winogrande": (
        "winogrande/default.yaml",
        {"train": "validation", "validation": "validation"},
    ),
    "piqa": ("piqa/piqa.yaml", {"train": "validation", "validation": "validation"}),
    "wikitext": (
        "wikitext/wikitext.yaml",
        {"train": "test", "validation": "test", "test": "test"},
    ),
}
FOLDERS = {"wikitext": "wikitext2_document_level_test"}
LIMITS = {"wikitext": 3}
METRICS = {
    "acc": "acc,none",
    "acc_norm": "acc_norm,none",
    "perplexity_word": "word_perplexity,none",
}

pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")


@pytest.fixture(scope="module")
def by_command_line(tmp_path_factory):
    """What `lm-eval` writes: by suite, the results by the harness's names of metrics. One call for
    all: most of its time goes into its start. A suite's own limit is a file that is as short."""
    folder = tmp_path_factory.mktemp("lm_eval")
    for suite, (definition, files) in SUITES.items():
        data = {split: data_file(suite, name, folder) for split, name in files.items()}
        (folder / f"{suite}.yaml").write_text(
            f"include: {TASKS / definition}\ntask: {suite}\n"
            "dataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps({'data_files': data})}\n"
        )
    command = {
        "--model": "hf",
        "--model_args": f"pretrained={MODEL},softmax_dtype=float32",
        "--tasks": ",".join(SUITES),
        "--include_path": folder,
        "--limit": LIMIT,
        "--batch_size": BATCH_SIZE,
        "--device": "cpu",
        "--output_path": folder / "out",
    }
    arguments = [str(part) for pair in command.items() for part in pair]
    lm_eval_main = "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", lm_eval_main, "run", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    return json.loads(results.read_text())["results"]


def data_file(suite, name, folder):
    """Path of a split's file, or of its first documents."""
    whole = DATA / FOLDERS.get(suite, suite) / f"{name}.jsonl.gz"
    if suite not in LIMITS:
        return str(whole)
    short = folder / f"{suite}-{name}.jsonl"
    with gzip.open(whole, "rt", encoding="utf-8") as lines:
        short.write_text("".join(islice(lines, LIMITS[suite])), encoding="utf-8")
    return str(short)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.mark.parametrize("suite", SUITES)
def test_to_the_last_digit(suite, model, by_command_line):
    with loaded_suites([suite], SuiteSources(mirror=DATA)) as suites:
        found = evaluate_suite(
            model,
            AutoTokenizer.from_pretrained(MODEL),
            suites[suite],
            batch_size=BATCH_SIZE,
            limit=LIMITS.get(suite, LIMIT),
        )
    expected = by_command_line[suite][METRICS[found.metric]]
    unit = 1 if found.metric == "perplexity_word" else 100
    assert found.value == pytest.approx(unit * expected, rel=1e-14)
    assert 0 < found.value != unit

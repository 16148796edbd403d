"""The forest's scorer beside lm-evaluation-harness's HFLM: same requests, same model, same run.

For each suite: seconds, the tokens that run through the blocks (HFLM's with what fills up its
batches), the largest relative difference of a log-likelihood, and the floor, which is the time of
the linears' products for the distinct tokens alone (blocks), and of the head's for those that
predict; and each answer that differs, with its margin by both (nats). Seconds are the process's own
(`time.process_time`), so that other work on the machine counts less, or on a GPU the clock's; both
sides start from the texts of the requests.

    PYTHONPATH=tests python tests/bench/scorer.py ../shared/models/wiki-llama-12m --documents 200
    PYTHONPATH=tests python tests/bench/scorer.py FOLDER --suites mmlu --subjects 4 --documents 50
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch
from reference_harness import harness_of
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpq_core.evaluation.forest import Asked, chunks_of
from dpq_core.evaluation.requests import Encoder
from dpq_core.evaluation.results import suite_scores
from dpq_core.evaluation.scorer import answers, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.evaluation.suites.definitions import SuiteSources, loaded_suites
from dpq_core.machine.device import freed_memory_kept

DATA = Path(__file__).parents[2].parent / "shared" / "data"
TOGETHER = ["hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "boolq"]
OTHERS = ["winogrande", "lambada_openai", "wikitext"]
ROWS = 2_048


def now(device):
    """Seconds of this process, or of the clock when a GPU has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def by_harness(model, tokenizer, suite):
    """Seconds, tokens that ran (with padding), answers."""
    batch = 16 if model.device.type == "cpu" else 64
    harness, ran = harness_of(model, tokenizer, batch), 0
    call = harness._model_call

    def counted(inps, *args, **kwargs):
        nonlocal ran
        ran += inps.numel()
        return call(inps, *args, **kwargs)

    harness._model_call = counted
    start = now(model.device)
    instances = [each for task in suite.tasks.values() for each in task.instances]
    found = getattr(harness, instances[0].request_type)(instances)
    return now(model.device) - start, ran, found


def by_forest(subject, encoder, suite):
    """Seconds, tokens that ran, answers, tokens that predict, seconds of the requests alone."""
    device = subject.stream.device
    start = now(device)
    asked = encoder.encoded(suite)
    chunks = list(chunks_of(asked.asked))
    before = now(device) - start
    scores = [each for chunk in chunks for each in score(subject, [chunk])]
    found = answers(scores, asked.count)
    taken = now(device) - start
    predict = sum(len(chunk.places.unique()) for chunk in chunks)
    return taken, sum(each.computed for each in scores), found, predict, before


@torch.inference_mode()
def floor(model):
    """Seconds of the blocks' products for a token, and of the head's."""
    head, blocks, at_head = model.get_output_embeddings(), 0.0, 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight
            x = torch.randn(ROWS, module.in_features).to(weight)
            linear(x, weight)
            start = now(weight.device)
            linear(x, weight)
            taken = (now(weight.device) - start) / ROWS
            blocks, at_head = (blocks, taken) if module is head else (blocks + taken, at_head)
    return blocks, at_head


def compared(found, expected):
    """Largest relative difference of log-likelihoods."""
    pairs = [
        (ours[0], theirs[0] if isinstance(theirs, tuple) else theirs)
        for ours, theirs in zip(found, expected, strict=True)
    ]
    return max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs)


def differing(suite, found, expected, limit):
    """Lines about documents whose answer is another one, where there are choices."""
    if not isinstance(expected[0], tuple):  # rolling
        return
    ours, theirs = (suite_scores(suite, each, limit=limit) for each in (found, expected))
    for number, (one, other) in enumerate(zip(ours.picks, theirs.picks, strict=True)):
        if one != other:
            margin, their_margin = ours.margins[number], theirs.margins[number]
            yield f"  document {number}: {other} by {their_margin:.3g}, here {one} by {margin:.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--suites", nargs="+", default=TOGETHER + OTHERS)
    parser.add_argument("--fewshot", type=int, default=5, help="examples of mmlu")
    parser.add_argument("--subjects", type=int, default=57, help="the first of mmlu's")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--streamed", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--data", type=Path, default=DATA)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    dtype = torch.float32 if asked.float32 else None
    model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=dtype or "auto").eval()
    model = model.to(asked.device)
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    resident = not asked.streamed
    subject = subject_of(asked.folder, asked.device, dtype=dtype, resident=resident)
    blocks, head = floor(model)
    print(
        f"{asked.folder.name}, {model.dtype}, {asked.device}, {asked.threads} thread(s), load",
        os.getloadavg(),
    )
    print(f"prefixes shared: {subject.unshared or 'yes'}")
    print(
        "suite            HFLM s   ours s  times  (requests s)  floor s  HFLM tokens    ours  apart"
    )
    score(subject, list(chunks_of([Asked(tuple(range(40)), 3, 0)])))  # what is done once
    encoder = Encoder(tokenizer, subject.stream.model.config)
    harness_of(model, tokenizer, 16)
    sums = [0.0, 0.0]
    examples = {"mmlu": asked.fewshot} if "mmlu" in asked.suites else {}
    sources = SuiteSources(mirror=asked.data)
    with freed_memory_kept(), loaded_suites(asked.suites, sources, examples) as suites:
        for name, whole in suites.items():
            tasks = dict(list(whole.tasks.items())[: asked.subjects])
            suite = dataclasses.replace(whole, tasks=tasks)
            for task in suite.tasks.values():
                task.build_all_requests(limit=asked.documents, rank=0, world_size=1)
            ours, ran, found, predict, before = by_forest(subject, encoder, suite)
            theirs, padded, expected = by_harness(model, tokenizer, suite)
            least = ran * blocks + predict * head
            print(
                f"{name:15} {theirs:7.2f} {ours:8.2f} {theirs / ours:6.2f} {before:9.2f}"
                f" {least:12.2f} {padded:12,} {ran:8,} {compared(found, expected):.1e}",
                flush=True,
            )
            for line in differing(suite, found, expected, asked.documents):
                print(line, flush=True)
            if name in TOGETHER:
                sums = [sums[0] + theirs, sums[1] + ours]
    if sums[1]:
        print(f"together        {sums[0]:7.2f} {sums[1]:8.2f} {sums[0] / sums[1]:6.2f}")
    print("load", os.getloadavg())


if __name__ == "__main__":
    main()

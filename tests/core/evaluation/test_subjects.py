"""Architectures, quantized candidates, streaming and workers: the same scores whoever computes."""

import math
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from accelerate import init_empty_weights
from architectures import ARCHITECTURES, class_of, random_model
from model_families import save
from transformers import AutoModelForCausalLM

from dpq_core.checkpoint.native import load_model
from dpq_core.evaluation import head, walk
from dpq_core.evaluation.divergence import divergence
from dpq_core.evaluation.forest import CHUNK, Asked, chunks_of
from dpq_core.evaluation.grain import ACCELERATOR
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.room import RESIDENT, Sizes
from dpq_core.evaluation.scorer import answers, last_states, score
from dpq_core.evaluation.sharing import why_not_shared
from dpq_core.evaluation.subject import subject_of
from dpq_core.layer.linear import W4A8Linear
from dpq_core.model.empty import building, empty_of
from dpq_core.model.finite import NotFiniteError
from dpq_core.model.streaming import StreamedModel
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving.runtimes import runtime_for

UNSHARED = {
    "StableLM": "its attention is not called with what the model is called with",
    "Falcon 7B": "its attention is not called through transformers' interface",
    "Falcon 40B": "its attention is not called through transformers' interface",
    "BLOOM": "its attention is not called through transformers' interface",
}
TEXT = [each for each in ARCHITECTURES if class_of(each.config).__name__.endswith("CausalLM")]
RUN = ["Llama 2", "Mistral", "Gemma 2", "Gemma 3", "Granite 3", "OPT", "StableLM", "BLOOM"]


def asked_of(vocabulary, seed=0):
    """Questions of four choices and a text alone."""
    generator = torch.Generator().manual_seed(seed)

    def some(count):
        return torch.randint(5, vocabulary, (count,), generator=generator).tolist()

    asked = []
    for context in [some(30) for _ in range(5)]:
        for answer in map(some, (1, 2, 3, 4)):
            asked.append(Asked((*context, *answer), len(answer), len(asked)))
    text = some(90)
    return [*asked, Asked(tuple(text), 80, 20)]


@torch.inference_mode()
def one_by_one(model, asked):
    """By the whole model, a request at a time, float64 from the logits on."""
    found = []
    for each in asked:
        ids = torch.tensor(each.ids)
        logs = model(input_ids=ids[None, :-1]).logits[0].double().log_softmax(-1)[-each.scored :]
        wanted = ids[-each.scored :]
        sums = logs.gather(1, wanted[:, None]).sum().item()
        found.append((sums, bool((logs.argmax(-1) == wanted).all())))
    return found


@pytest.mark.parametrize("architecture", TEXT, ids=lambda each: each.name)
def test_what_shares_prefixes(architecture):
    found = why_not_shared(empty_of(architecture.config))
    assert found == UNSHARED.get(architecture.name)


def check_answers(name, folder, device="cpu", resident=False):
    """Those of an architecture's random model, beside the whole model's on the CPU."""
    (architecture,) = [each for each in ARCHITECTURES if each.name == name]
    random_model(architecture.config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = asked_of(model.config.vocab_size)
    subject = subject_of(folder, device, dtype=torch.float32, resident=resident)
    assert subject.unshared == UNSHARED.get(name)
    found = answers(score(subject, list(chunks_of(asked, 150))), len(asked))
    for ours, theirs in zip(found, one_by_one(model, asked), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
        assert ours[1] == theirs[1]


@pytest.mark.parametrize("name", RUN)
def test_answers_are_the_whole_model_s(name, tmp_path):
    check_answers(name, tmp_path)


@pytest.mark.parametrize("name", ["Llama 2", "Gemma 2", "StableLM"])
def test_an_accelerator_s_grain_gives_the_same_answers(name, tmp_path, monkeypatch):
    for module in (walk, head):
        monkeypatch.setattr(module, "grain_on", lambda device: ACCELERATOR)
    check_answers(name, tmp_path, resident=True)


def test_the_head_in_tiles_is_the_head(tmp_path):
    """Of a model that caps its logits."""
    (architecture,) = [each for each in ARCHITECTURES if each.name == "Gemma 2"]
    model = random_model(architecture.config).eval()
    model.save_pretrained(tmp_path)
    stream = subject_of(tmp_path, dtype=torch.float32).stream
    states = torch.randn(7, model.config.hidden_size)
    with torch.no_grad(), head_tiles(stream, columns=50) as tiles:
        parts = [tile for _, tile in tiles.logits(states)]
        whole = stream.logits(states[None])[0]
    assert [part.shape[1] for part in parts] == [50] * (len(whole[0]) // 50) + [len(whole[0]) % 50]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def candidate(quickstart_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("candidate") / "checkpoint"
    quantize_checkpoint(
        quickstart_model,
        folder,
        torch.randint(200, (4, 64), generator=torch.Generator().manual_seed(0)),
        Scheme(method="rtn", rounding="nearest", group_size=32),
        CalibrationSection(dataset=TextDataset(path="none"), required_tokens_per_input=0),
        about={},
    )
    return folder


def test_a_candidate_is_scored_with_its_quantized_linears(candidate, quickstart_model):
    asked = asked_of(200)
    subject = subject_of(candidate, dtype=torch.float32)
    found = answers(score(subject, list(chunks_of(asked))), len(asked))
    expected = one_by_one(load_model(candidate).float(), asked)
    original = one_by_one(load_model(quickstart_model).float(), asked)
    for (ours, _), (theirs, _), (others, _) in zip(found, expected, original, strict=True):
        # An activation at the edge of two FP8 values may be rounded to either.
        assert abs(ours - theirs) < 0.02 * max(abs(others - theirs), 0.1)


def test_what_is_scored_as_served_is_computed_by_the_runtime(candidate):
    runtime, asked = runtime_for(torch.device("cpu")), asked_of(200)
    served = subject_of(candidate, linear=runtime)
    with served.stream.block(0, {n: made() for n, made in served._layers.items() if ".0." in n}):
        made = [isinstance(each, W4A8Linear) for each in served.stream.model.modules()]
    assert runtime.refused == {"kept in 16 bits": 1}  # of seven: too few tokens for its inputs
    assert sum(made) == 1
    found = answers(score(served, list(chunks_of(asked))), len(asked))
    expected = answers(score(subject_of(candidate), list(chunks_of(asked))), len(asked))
    apart = [abs(ours - theirs) for (ours, _), (theirs, _) in zip(found, expected, strict=True)]
    assert max(apart) < 0.5  # sums in another order, in BF16; with AMX they are the same here
    assert sum(apart) / len(apart) < 0.1


def sums_of(scores):
    return [(each.requests.tolist(), each.sums.tolist(), each.greedy.tolist()) for each in scores]


def score_in_worker(folder, chunk):
    """A chunk by a process that knows nothing else."""
    torch.set_num_threads(1)
    return sums_of(score(subject_of(folder), [chunk]))


def test_scores_have_the_same_bits_whoever_computes_them(candidate):
    chunks = list(chunks_of(asked_of(200), 120))
    assert len(chunks) >= 3
    streamed = sums_of(score(subject_of(candidate), chunks))
    resident = subject_of(candidate, resident=True)
    assert streamed == sums_of(score(resident, chunks))
    assert streamed == [sums_of(score(resident, [chunk]))[0] for chunk in reversed(chunks)][::-1]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(score_in_worker, candidate, chunk) for chunk in chunks]
        assert streamed == [job.result()[0] for job in jobs]


def test_a_planted_fault_shows_in_the_divergence(quickstart_model, candidate):
    """A layer's scale doubled in the candidate, beside the candidate itself."""
    chunks = list(chunks_of(asked_of(200)))
    subjects = [subject_of(folder, resident=True) for folder in (quickstart_model, candidate)]
    faulty = subject_of(candidate, resident=True)
    with faulty.block(0):
        block = faulty.stream.kept[faulty.stream.block_name(0)]
        linear = next(m for m in block.modules() if hasattr(m, "weight8"))
        linear.channel_scale *= 2
    states = [last_states(each, chunks)[0].hidden for each in (*subjects, faulty)]
    with torch.no_grad(), head_tiles(subjects[0].stream) as p, head_tiles(subjects[1].stream) as q:
        itself = divergence(p, states[0], p, states[0])
        quantized = divergence(p, states[0], q, states[1])
        broken = divergence(p, states[0], q, states[2])
    assert itself.nats.max() < 1e-9
    assert itself.agree.all()
    assert 0 < quantized.nats.mean() < broken.nats.mean() / 2
    assert broken.agree.double().mean() < quantized.agree.double().mean()


@pytest.mark.parametrize("resident", [True, False])
def test_a_model_is_scored_while_other_threads_build_one(tmp_path, resident):
    """accelerate redirects the parameters that any thread sets meanwhile: a head that was given one
    became empty, and PyTorch multiplied with whatever was in memory."""
    save("llama-3.2", tmp_path)
    chunks = list(chunks_of(asked_of(200)))
    expected = answers(score(subject_of(tmp_path, resident=resident), chunks), 21)
    ended = threading.Event()

    def build():
        while not ended.is_set():
            with building, init_empty_weights():
                time.sleep(0.002)
            time.sleep(0.002)

    builder = threading.Thread(target=build)
    builder.start()
    try:
        subject = subject_of(tmp_path, resident=resident)
        found = [answers(score(subject, chunks), 21) for _ in range(40)]
    finally:
        ended.set()
        builder.join()
    assert found == [expected] * 40


def test_a_request_without_scores_is_named(candidate):
    chunks = list(chunks_of(asked_of(200), 200))
    scores = score(subject_of(candidate), chunks[:1])
    missing = min(set(range(21)) - set(scores[0].requests.tolist()))
    with pytest.raises(ValueError, match=f"request {missing} of 21 is in no chunk"):
        answers(scores, 21)


def test_not_a_number_stays_one(tmp_path, quickstart_model):
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan
    model.save_pretrained(tmp_path)
    asked = asked_of(200)
    found = answers(score(subject_of(tmp_path), list(chunks_of(asked))), len(asked))
    assert all(math.isnan(value) and not greedy for value, greedy in found)


def test_a_block_that_overflows_is_named(tmp_path, quickstart_model):
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = math.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(NotFiniteError, match=r"model\.layers\.1: the \w+ model's hidden states"):
        score(subject_of(tmp_path), list(chunks_of(asked_of(200))))


def sizes(weights, block=1 << 20):
    return Sizes(weights=weights, block=block, embedding=1 << 20, hidden=1024, widest=4096)


def test_a_small_model_stays_and_a_large_one_has_a_quarter_of_its_bytes_in_hand():
    small, large = sizes(RESIDENT // 2), sizes(RESIDENT // 2 + 1, block=1 << 26)
    assert (small.resident, large.resident) == (True, False)
    assert small.tokens_in_hand(1 << 40) == CHUNK
    assert large.tokens_in_hand(1 << 40) == RESIDENT // 4 // (1024 * 2)
    assert large.tokens_in_hand(100) == CHUNK  # one chunk always goes
    assert large.bytes_of(large.tokens_in_hand(1 << 40)) < RESIDENT  # a block beside


def test_sizes_are_those_of_the_model(tmp_path):
    folder = save("llama-2", tmp_path)
    model = load_model(folder)
    found = Sizes.of(StreamedModel(folder))
    assert found.weights == sum(p.numel() for p in model.parameters())
    assert found.block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert found.embedding == model.model.embed_tokens.weight.numel()
    assert found.hidden == model.config.hidden_size

"""What is timed is the real work: its tokens are those of transformers' own `generate`."""

import re
from dataclasses import dataclass

import pytest
import torch

from dpq_core.benchmark import throughput
from dpq_core.benchmark.formats_timed import (
    VARIANTS,
    Checkpoint,
    Shape,
    VariantError,
    load_of,
    random_layer,
    rounded,
    variant_scheme,
)
from dpq_core.benchmark.roofline import Device, Load
from dpq_core.benchmark.throughput import Cell, Times, measure, random_prompts
from dpq_core.kernels.attention import NAME, attend_in_groups
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.linear import W4A8Linear
from dpq_core.layer.quantize import quantize_layer
from dpq_core.layer.storage import expected_shapes, layer_tensors
from dpq_core.machine.working_memory import tensor_bytes
from dpq_core.model.context import ContextError
from dpq_core.recipe import BenchmarkSection
from dpq_core.recipe.scheme import PRESETS, Scheme
from dpq_core.serving.decoding import Decoder, context_bytes, generate, static_cache
from dpq_core.serving.runtimes import RuntimeUnavailableError, runtime_for

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SCHEMES = {
    "static": Scheme(),
    "symmetric": Scheme(symmetric=True, activations="dynamic"),
    "int8": Scheme(inner="int8"),
    "hopper": Scheme(**PRESETS["hopper-vllm"]),
    "gaudi": Scheme(**PRESETS["gaudi-inc"]),
}


def no_runtime():
    try:
        runtime_for(CPU)
    except RuntimeUnavailableError as error:
        return str(error)
    return ""


needs_runtime = pytest.mark.skipif(bool(no_runtime()), reason=no_runtime())


@dataclass(frozen=True)
class Asked:
    variants: tuple[str, ...] = ("bf16", "w4a16", "w4a8")  # a kernel: each kind takes seconds
    batches: tuple[int, ...] = (1, 3)
    prompt_tokens: int = 9
    new_tokens: int = 5
    repeats: int = 2


def tiny(**changes):
    return Shape("tiny", Scheme(), {**TINY, **changes})


@pytest.fixture(scope="module")
def source(quickstart_model):
    return Checkpoint(quickstart_model, Scheme(), {})


def test_a_recipe_names_the_variants_that_there_are():
    assert BenchmarkSection().variants == list(VARIANTS)


def check_tokens(model, prompts, graph, new_tokens=12):
    cache = static_cache(model, len(prompts), prompts.shape[1] + new_tokens)
    expected = model.generate(
        prompts,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        pad_token_id=0,
    )[:, prompts.shape[1] :]
    decoder = Decoder(attend_in_groups(model), cache, len(prompts), graph)
    for _ in range(2):  # a cache that was used is as good as a new one
        assert torch.equal(generate(decoder, prompts, new_tokens), expected)


@pytest.mark.parametrize("variant", ["bf16", "w4a8"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_those_of_generate(source, variant, batch):
    model = source.build(variant, CPU, W4A8Linear)
    check_tokens(model, random_prompts(model.config.vocab_size, batch, 17), graph=False)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_heads_that_share_keys_attend_as_transformers_has_it(key_heads):
    """In FP32, where the order of sums does not show."""
    model = tiny(num_key_value_heads=key_heads).build("bf16", CPU, W4A8Linear).float()
    prompts, cache = random_prompts(300, 3, 9), static_cache(model, 3, 10)
    step = {"input_ids": prompts[:, :1], "past_key_values": cache}
    logits = []
    with torch.inference_mode():
        for change in (lambda model: model, attend_in_groups):
            attending = change(model)
            cache.reset()
            attending(prompts, past_key_values=cache)
            logits.append(attending(**step).logits)
    assert model.config._attn_implementation == NAME
    torch.testing.assert_close(*logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_tokens_of_a_cuda_graph_are_those_of_generate(source):
    model = source.build("bf16", torch.device("cuda"), W4A8Linear)
    prompts = random_prompts(model.config.vocab_size, 2, 17).cuda()
    check_tokens(model, prompts, graph=True)


@needs_runtime
def test_every_variant_at_every_batch():
    steps = []
    asked = Asked()
    found = measure(tiny(), asked, CPU, lambda done, total: steps.append((done, total)))
    assert [(c.variant, c.batch) for c in found.cells] == [
        (variant, batch) for variant in asked.variants for batch in asked.batches
    ]
    for cell in found.cells:
        assert not cell.wrong
        assert cell.decode_tokens_per_second == pytest.approx(cell.batch / cell.step_seconds)
        prompt = cell.batch * asked.prompt_tokens
        assert cell.prefill_tokens_per_second == pytest.approx(prompt / cell.first_token_seconds)
        assert 0 < cell.first_token_seconds < 60
        assert cell.memory_bytes > 2 * 2 * TINY["vocab_size"] * TINY["hidden_size"]
        assert cell.limit > 0
    speed = {(c.variant, c.batch): c.decode_tokens_per_second for c in found.cells}
    assert found.ratio() == speed["w4a8", 1] / speed["bf16", 1]
    assert any("took turns" in note for note in found.notes)
    runtime = runtime_for(CPU).runtime.name
    assert any(note.startswith(f"w4a8: runtime {runtime}") for note in found.notes)
    assert steps == [(n, 6) for n in range(1, 7)]


@pytest.fixture
def rated(monkeypatch):
    """A device whose rates are known."""
    monkeypatch.setattr(throughput, "measured_device", lambda device: Device(1e10, 1e12))


@needs_runtime
def test_what_does_not_fit_has_a_reason_and_no_number(monkeypatch, rated):
    room = 5_000_000  # bytes: for a batch of one, not for one of a thousand
    monkeypatch.setattr(throughput, "free_bytes", lambda device: room)
    asked = Asked(variants=("bf16", "w4a8"), batches=(1, 1000), repeats=1)
    found = measure(tiny(), asked, CPU)
    assert any("one after another" in note for note in found.notes)
    for cell in found.cells:
        assert (cell.decode_tokens_per_second is None) == (cell.batch == 1000)
        assert cell.wrong.startswith("out of memory: about") == (cell.batch == 1000)
    assert found.ratio() > 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeUnavailableError("it cannot run here: no kernel"), "it cannot run here: no kernel"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory."),
        (KeyError("layer"), "failed: KeyError: 'layer'"),
    ],
)
def test_a_variant_that_fails_says_why_and_the_others_go_on(monkeypatch, rated, error, said):
    def unavailable(device):
        raise error

    monkeypatch.setattr(throughput, "runtime_for", unavailable)
    found = measure(tiny(), Asked(variants=("bf16", "w4a8"), batches=(1,), repeats=1), CPU)
    bf16, w4a8 = found.cells
    assert bf16.decode_tokens_per_second > 0
    assert w4a8.decode_tokens_per_second is None
    assert w4a8.wrong.startswith(said)
    assert found.ratio().startswith(f"w4a8 was not measured at batch 1: {said}")


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        (Times("cuda", wrong="not measured here: no GPU"), "not measured here: no GPU"),
        (Times("cpu", cells=(Cell("w4a8", 1, wrong="out of memory: x"),)), "w4a8 was not.*: out"),
        (Times("cpu", cells=(Cell("w4a8", 1, decode_tokens_per_second=2.0),)), "bf16 was not"),
    ],
)
def test_a_ratio_that_is_missing_says_why(times, reason):
    found = times.ratio()
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_more_tokens_than_the_model_has_context_are_refused():
    with pytest.raises(ContextError, match="9000, and the model's context is 8192"):
        measure(tiny(), Asked(prompt_tokens=8000, new_tokens=1000), CPU)


@pytest.mark.parametrize("variant", ["fp8", "w4a16", "w4a8"])
@pytest.mark.parametrize("name", SCHEMES)
def test_rounding_at_load_is_round_to_nearest(name, variant):
    scheme = variant_scheme(SCHEMES[name], variant)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 256, generator=generator).bfloat16() / 50
    statistics, inputs = InputStatistics.empty(256), torch.randn(512, 256, generator=generator)
    statistics.add_hessian(inputs)
    statistics.add_magnitudes(inputs)
    expected = layer_tensors(quantize_layer(weight, statistics, scheme))
    found = layer_tensors(rounded(weight, scheme))
    assert found.keys() == expected.keys()
    for part in found.keys() - {"input_scale"}:  # which is arbitrary
        assert torch.equal(found[part].float(), expected[part].float()), part


@pytest.mark.parametrize("variant", ["fp8", "w4a16", "w4a8"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_random_layer_is_as_one_is_stored(name, variant):
    scheme = variant_scheme(SCHEMES[name], variant)
    layer = random_layer(64, 256, scheme, torch.Generator().manual_seed(2))
    stored = layer_tensors(layer)
    shapes = expected_shapes(64, 256, scheme)
    assert {part: list(tensor.shape) for part, tensor in stored.items()} == {
        part: shape for part, (shape, _) in shapes.items()
    }
    assert 0.01 < layer.decoded().std() < 0.04


def test_bytes_that_a_step_reads():
    model = tiny().empty()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    linears = sum(n for name, n in sizes.items() if "_proj" in name)
    read = sum(sizes.values()) - sizes["model.embed_tokens.weight"]
    assert context_bytes(model.config) == 2 * 2 * 2 * 64  # layers, keys and values, BF16, width
    assert load_of(tiny(), "bf16") == Load(2 * read, read, context_bytes(model.config))
    four, eight = load_of(tiny(), "w4a8"), load_of(tiny(), "fp8")
    assert four.weights == eight.weights == read
    assert 0.5 < (four.weight_bytes - 2 * (read - linears)) / linears < 0.6
    assert 1.0 < (eight.weight_bytes - 2 * (read - linears)) / linears < 1.1
    tied = load_of(tiny(tie_word_embeddings=True), "bf16")
    assert tied.weights == read
    built = tiny(tie_word_embeddings=True).build("bf16", CPU, W4A8Linear)
    assert tensor_bytes(built) >= tied.weight_bytes
    assert built.lm_head.weight is built.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("batch", "tokens_per_second"),
    [(1, 1 / 110e-6), (100, 100 / (2 * 100 * 1e6 / 100e9))],  # bytes, then products
)
def test_the_roofline(batch, tokens_per_second):
    device = Device(bandwidth=10e9, product_rate=100e9)
    load = Load(weight_bytes=1_000_000, weights=1_000_000, context_bytes=1000)
    assert load.tokens_per_second(batch, 100, device) == pytest.approx(tokens_per_second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: variant_scheme(Scheme(), "int3"), "int3.*bf16, fp8, w4a16, w4a8"),
        (lambda: variant_scheme(Scheme(bits=8), "w4a8"), "8 bits.*benchmark.variants"),
        (lambda: Shape.named("llama-9b", Scheme()), "llama-9b.*llama-160m"),
    ],
)
def test_what_there_is_not_is_refused_by_name(call, message):
    with pytest.raises(VariantError, match=message):
        call()

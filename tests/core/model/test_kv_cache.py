"""Keys and values that are rounded between a model and its cache, whoever computes attention."""

import copy
from functools import partial

import pytest
import torch
from architectures import ARCHITECTURES, random_model
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dpq_core.checkpoint.native import QuantizedCheckpoint, load_quantized
from dpq_core.evaluation.divergence import divergence
from dpq_core.evaluation.forest import Asked, chunks_of
from dpq_core.evaluation.head import head_tiles
from dpq_core.evaluation.scorer import answers, last_states, score
from dpq_core.evaluation.subject import subject_of
from dpq_core.layer.kv_cache import as_kept
from dpq_core.model.empty import empty_of
from dpq_core.model.kv_cache import attention_of, check_cache, maxima_of_cache
from dpq_core.model.reader import CheckpointError
from dpq_core.pipeline import quantize_checkpoint
from dpq_core.recipe import CalibrationSection, TextDataset
from dpq_core.recipe.scheme import Scheme

OF = {each.name: each for each in ARCHITECTURES}
NO_CACHE = {
    "Falcon 7B": "has no one attention with a cache",
    "Falcon 40B": "has no one attention with a cache",
    "GPT-NeoX, Pythia": "has no one attention with a cache",
    "BLOOM": "has no one attention with a cache",
    "DeepSeek-V3": "engines keep the latent that keys and values are made of",
}
# Grouped queries, windows that slide, kinds of rotary embeddings, norms of keys, attention that is
# not shared, a fused projection.
RUN = ["Llama 3, 3.1", "Mistral", "Gemma 3", "Qwen3", "StableLM", "Phi-3, Phi-4", "OPT"]
SIXTEEN = {"method": "none", "inner": "none", "activations": "none", "group_size": 16}
WINDOWS = torch.randint(5, 200, (4, 40), generator=torch.Generator().manual_seed(0))
SECTION = CalibrationSection(
    dataset=TextDataset(path="none"), batch_size=2, required_tokens_per_input=0
)


class RoundedCache(DynamicCache):
    """transformers' cache, that keeps what an engine keeps. scales: of keys and values by layer."""

    def __init__(self, config, scales):
        super().__init__(config=config)
        self.scales = scales

    def update(self, key, value, layer, *about, **named):
        keys, values = self.scales[layer]
        return super().update(as_kept(key, keys), as_kept(value, values), layer, *about, **named)


def rounded_cache(checkpoint, model):
    """For the model in 16 bits, by the scales that a checkpoint stores."""
    stored = QuantizedCheckpoint(checkpoint)
    scales = [
        [stored.reader.tensor(f"{name}.{scale}") for scale in ("k_scale", "v_scale")]
        for name in stored.cache
    ]
    return partial(RoundedCache, model.config, scales)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from an architecture and fields to a model's folder and a checkpoint's."""
    found = {}

    def make(name, **fields):
        key = name, *fields.items()
        if key not in found:
            base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("out") / "native"
            random_model(OF[name].config).bfloat16().save_pretrained(base)
            scheme = Scheme(**SIXTEEN, kv_cache="fp8", **fields)
            quantize_checkpoint(base, out, WINDOWS, scheme, SECTION, {})
            found[key] = base, out
        return found[key]

    return make


def logits_of(model, ids, **named):
    with torch.inference_mode():
        return model(input_ids=ids, **named).logits.float()


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_what_keeps_its_keys_and_values(architecture):
    model = empty_of(architecture.config)
    if (why := NO_CACHE.get(architecture.name)) is None:
        check_cache(model)
        return
    with pytest.raises(CheckpointError, match=f"scheme.kv_cache: .*{why}.*kv_cache: none"):
        check_cache(model)


def test_a_block_that_reads_another_s_keys_is_refused():
    model = empty_of(OF["Llama 2"].config)
    model.config.num_kv_shared_layers = 1
    with pytest.raises(CheckpointError, match="1 of its blocks read the keys and values of others"):
        check_cache(model)


@pytest.mark.parametrize("per", ["tensor", "head"])
@pytest.mark.parametrize("name", RUN)
def test_a_checkpoint_computes_as_with_a_cache_that_rounds(made, name, per):
    base, out = made(name, kv_cache_scale=per)
    QuantizedCheckpoint(out).verify()
    model, ours = AutoModelForCausalLM.from_pretrained(base).eval(), load_quantized(out)
    cache = rounded_cache(out, model)
    expected = logits_of(model, WINDOWS[:2], past_key_values=cache(), use_cache=True)
    assert torch.equal(logits_of(ours, WINDOWS[:2], use_cache=False), expected)
    assert torch.equal(logits_of(ours, WINDOWS[:2], use_cache=True), expected)
    assert not torch.equal(logits_of(model, WINDOWS[:2]), expected)


def test_a_cache_of_one_size_keeps_rounded_keys_too(made):
    """As `dpq_core.serving.decoding` has it: the prompt, then a token."""
    base, out = made("Llama 3, 3.1", kv_cache_scale="tensor")
    model, ours = AutoModelForCausalLM.from_pretrained(base).eval(), load_quantized(out)
    caches = rounded_cache(out, model)(), StaticCache(ours.config, max_cache_len=64)
    for part in (WINDOWS[:1, :-1], WINDOWS[:1, -1:]):
        expected, found = (
            logits_of(each, part, past_key_values=cache, use_cache=True)
            for each, cache in zip((model, ours), caches, strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    kept = caches[1].layers[0].keys[:, :, : WINDOWS.shape[1]]
    scale = ours.get_buffer("model.layers.0.self_attn.k_scale")
    assert torch.equal(as_kept(kept, scale), kept)
    assert kept.abs().max() > 0


def test_what_is_generated_reads_the_rounded_cache(made):
    base, out = made("Gemma 3", kv_cache_scale="tensor")
    model, ours = AutoModelForCausalLM.from_pretrained(base).eval(), load_quantized(out)
    about = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    cache = rounded_cache(out, model)()
    theirs = model.generate(WINDOWS[:1], past_key_values=cache, **about)
    assert torch.equal(ours.generate(WINDOWS[:1], **about), theirs)


@pytest.mark.parametrize("name", RUN[:-1])  # OPT's biases do not go with FP32
def test_the_scorer_gives_what_the_whole_model_with_a_rounded_cache_does(made, name):
    """In FP32, prefixes shared or not, streamed and resident."""
    base, out = made(name, kv_cache_scale="head")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    cache = rounded_cache(out, model)
    rows, asked = WINDOWS.tolist(), []
    for row in rows:
        asked += [
            Asked(tuple(row[:length]), 6, len(asked) + n) for n, length in enumerate((36, 40))
        ]
        asked.append(Asked((*row[:30], *rows[0][:5]), 5, len(asked)))
    expected = []
    for each in asked:
        ids = torch.tensor([each.ids])
        found = logits_of(model, ids[:, :-1], past_key_values=cache(), use_cache=True)[0].double()
        logs = found.log_softmax(-1)[-each.scored :]
        expected.append(logs.gather(1, ids[0, -each.scored :, None]).sum().item())
    chunks = list(chunks_of(asked, 150))
    streamed = subject_of(out, dtype=torch.float32)
    found = answers(score(streamed, chunks), len(asked))
    assert [sums for sums, _ in found] == pytest.approx(expected, rel=2e-3)
    resident = subject_of(out, dtype=torch.float32, resident=True)
    assert answers(score(resident, chunks), len(asked)) == found
    plain = answers(score(subject_of(base, dtype=torch.float32), chunks), len(asked))
    apart = [abs(a[0] - b) for a, b in zip(plain, expected, strict=True)]
    errors = [abs(a[0] - b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < max(apart) / 3


def test_scales_a_power_of_two_off_raise_the_divergence(made):
    """Too small: the largest keys saturate. Far too large: the small ones come down to zeros."""
    base, out = made("Llama 3, 3.1", kv_cache_scale="tensor")
    (chunk,) = chunks_of([Asked(tuple(row), 30, n) for n, row in enumerate(WINDOWS.tolist())])
    before = subject_of(base, resident=True)

    def nats(factor):
        after = subject_of(out, resident=True)
        for index in range(after.stream.block_count):
            with after.block(index):
                block = after.stream.kept[after.stream.block_name(index)]
                attention = block.get_submodule(attention_of(block))
                for scale in (attention.k_scale, attention.v_scale):
                    scale.mul_(factor)
        (theirs,), (ours,) = last_states(before, [chunk]), last_states(after, [chunk])
        with torch.no_grad(), head_tiles(before.stream) as p, head_tiles(after.stream) as q:
            return float(divergence(p, theirs.hidden, q, ours.hidden).nats.mean())

    right = nats(1)
    assert right > 0
    assert nats(2**-1) > 1.3 * right  # 1.7 times, the largest keys alone
    assert nats(2**-2) > 10 * right
    assert nats(2**1) < 1.01 * right  # an octave is not missed
    assert nats(2**14) > 5 * right


def test_maxima_are_of_all_windows_and_nothing_else_changes(made):
    """Calibration looks at what the 16-bit model hands to its cache; it leaves no hook behind."""
    base, out = made("Llama 3, 3.1", kv_cache_scale="head")
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    plain, stored = logits_of(model, WINDOWS), QuantizedCheckpoint(out)
    for number, block in enumerate(model.model.layers):
        path = attention_of(block)
        with maxima_of_cache(block.get_submodule(path)) as found:
            assert torch.equal(logits_of(model, WINDOWS, use_cache=False), plain)
        (maxima,) = found
        name = f"model.layers.{number}.{path}"
        scales = maxima.scales("head")
        assert torch.equal(stored.reader.tensor(f"{name}.k_scale").float(), scales.keys)
        assert torch.equal(stored.reader.tensor(f"{name}.v_scale").float(), scales.values)
        assert stored.cache[name] == [list(maxima.keys.shape), list(maxima.values.shape)]
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "calibration",
    [
        {"propagation": "quantized"},
        {"propagation": "groups", "correction": 0.5},
        {"hessian_inputs": "bf16"},
    ],
    ids=str,
)
def test_scales_come_with_every_way_to_calibrate(made, calibration, tmp_path):
    base, _ = made("Llama 3, 3.1", kv_cache_scale="tensor")
    scheme = Scheme(group_size=16, rounding="nearest", kv_cache="fp8")
    section = SECTION.model_copy(update=calibration)
    quantize_checkpoint(base, tmp_path / "out", WINDOWS, scheme, section, {})
    checkpoint = QuantizedCheckpoint(tmp_path / "out")
    checkpoint.verify()
    assert len(checkpoint.cache) == 2
    assert logits_of(load_quantized(tmp_path / "out"), WINDOWS).isfinite().all()


def test_a_missing_or_misshapen_scale_is_refused(made, tmp_path):
    _, out = made("Llama 3, 3.1", kv_cache_scale="tensor")
    checkpoint = QuantizedCheckpoint(out)
    checkpoint.cache = {**checkpoint.cache, "model.layers.9.self_attn": [[2, 16], [2, 16]]}
    with pytest.raises(CheckpointError, match=r"layers\.9\.self_attn\.k_scale is missing"):
        checkpoint.verify()
    checkpoint = QuantizedCheckpoint(out)
    checkpoint.scheme = checkpoint.scheme.model_copy(update={"kv_cache_scale": "head"})
    with pytest.raises(CheckpointError, match=r"k_scale is BF16 \[1\], expected"):
        checkpoint.verify()


def test_copies_of_a_rounding_model_round(made):
    _, out = made("Mistral", kv_cache_scale="tensor")
    model = load_quantized(out)
    assert torch.equal(logits_of(copy.deepcopy(model), WINDOWS[:1]), logits_of(model, WINDOWS[:1]))

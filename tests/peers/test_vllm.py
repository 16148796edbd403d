"""vLLM for real: a process of it on this CPU attests exports, and refuses a planted fault."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dpq_core.attestation.statement import moved
from dpq_core.recipe import parse_recipe
from tasks.support.attestation import attested

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("vllm_python", "small_cache")]

AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()
FOUR_BITS = pytest.mark.skipif(not AVX512, reason="vLLM's 4-bit kernel for CPUs wants AVX-512")
FP8_CACHE = pytest.mark.skipif(not AVX512, reason="vLLM's FP8 cache on CPUs wants AVX-512")


@pytest.fixture
def small_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("DPQ_HOME", str(tmp_path / "home"))


@pytest.fixture
def recipe(quickstart_model, text_file, tmp_path):
    dataset = {"path": "json", "data_files": str(text_file)}
    arguments = ["--enforce-eager", "--max-model-len", "256"]
    return parse_recipe(
        {
            "model": {"id": str(quickstart_model)},
            "calibration": {"dataset": dataset},
            "evaluation": {"perplexity": {"dataset": dataset, "sequence_length": 128}},
            "export": ["compressed-tensors"],
            "attest": {"engine": "vllm", "windows": 4, "arguments": arguments},
            "execution": {"store": str(tmp_path / "store"), "device": "cpu"},
        }
    )


@pytest.fixture
def copied(tmp_path):
    def copy(folder, name="served"):
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy


def test_sixteen_bits(recipe, quickstart_model, copied):
    found = attested(recipe, copied(quickstart_model), None, "cpu")
    assert found.wrong is None
    engine = found.predicate["engine"]
    assert engine["name"] == "vllm"
    assert engine["version"] in engine["packages"].values()
    assert engine["device"]
    assert engine["driver"]


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("W8A8, INT8", "CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8"),
        pytest.param("W4A16", "CPUWNA16LinearKernel for CompressedTensorsWNA16", marks=FOUR_BITS),
    ],
)
def test_exports(recipe, exported, copied, name, kernel):
    found = attested(recipe, copied(exported(name)), None, "cpu")
    assert found.wrong is None, found.line
    assert any(kernel in each for each in found.predicate["engine"]["kernels"])
    again = attested(recipe, found.folder, None, "cpu", found.predicate)
    assert not [n for n in moved(found.predicate, again.predicate) if n.startswith("engine")]
    assert json.loads((found.folder / "attestation.json").read_text()) == again.statement


def test_a_shuffled_scale_is_refused(recipe, exported, copied):
    """vLLM serves the damaged file; what is right is the file as it was written."""
    right = exported("W8A8, INT8")
    wrong = copied(right, "wrong")
    (wrong / "export.json").unlink()  # with it the damage would be found before any engine
    shard = next(wrong.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(n for n in tensors if n.endswith("layers.0.mlp.down_proj.weight_scale"))
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, shard, {"format": "pt"})
    found = attested(recipe, wrong, right, "cpu")
    assert found.predicate["verdict"] == "refused"
    assert "mean_difference is" in found.wrong


@FP8_CACHE
def test_its_cache_on_a_cpu_truncates_what_others_round(vllm_python):
    """Of 0.32.0; a later one that rounds is good news for docs/exports.md."""
    script = Path(__file__).with_name("vllm_fp8_cache.py")
    said = subprocess.run([vllm_python, script], capture_output=True, text=True, check=True)
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["truncated"] == 1
    assert found["nearest"] < 0.6


@FP8_CACHE
def test_a_truncating_cache_is_refused_and_a_wrong_scale_all_the_more(recipe, exported, copied):
    """vLLM takes the cache's type and its scales from the export."""
    right = exported("FP8 cache")
    found = attested(recipe, copied(right), None, "cpu")
    assert found.predicate["verdict"] == "refused"
    wrong = copied(right, "wrong")
    (wrong / "export.json").unlink()
    shard = next(wrong.glob("*.safetensors"))
    tensors = load_file(shard)
    tensors = {n: x / 16 if n.endswith(".k_scale") else x for n, x in tensors.items()}
    save_file(tensors, shard, {"format": "pt"})
    worse = attested(recipe, wrong, right, "cpu")
    divergences = [each.predicate["figures"]["divergence"] for each in (found, worse)]
    assert divergences[1] > 3 * divergences[0] > 0.002

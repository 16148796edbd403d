import math

import pytest
import yaml
from pydantic import ValidationError

from dpq_core.digests import digest
from dpq_core.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from dpq_core.recipe.scheme import Scheme

CONTENT = {
    "model": {"id": "org/model"},
    "scheme": {"group_size": 64},
    "calibration": {"dataset": {"path": "text", "data_files": "corpus.txt"}},
}

UP = "model.layers.0.mlp.up_proj"
OTHER = {"path": "json", "data_files": "other.jsonl"}


@pytest.fixture
def recipe_file(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


def message_of(*arguments):
    """The error's message, which is one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_and_values(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.model.id == "org/model"
    assert recipe.scheme.group_size == 64
    assert recipe.scheme.method == "dpq"
    assert recipe.registered_name == "org-w4a8"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("scheme.grup_size=128", ["scheme.grup_size", "128"]),
        ("modle.id=x", ["modle"]),
        ("scheme.group_size=0", ["scheme.group_size", "got 0"]),
        ("scheme.group_size=many", ["scheme.group_size", "'many'"]),
        ("scheme.fp8_max=300", ["scheme.fp8_max", "240", "448", "got 300"]),
        ("scheme.damp_frac=1.5", ["scheme.damp_frac", "got 1.5"]),
        ("scheme.method=awq", ["scheme.method", "'awq'"]),
        ("scheme.method=gptq", ["scheme", "gptq", "inner is 'e4m3'", "set inner: none"]),
        ("scheme.inner=none", ["scheme", "dpq", "inner is 'none'", "set inner: e4m3"]),
        ("scheme={method: naive, inner: none}", ["scheme", "naive", "inner is 'none'"]),
        ("scheme={method: rtn, inner: none}", ["scheme", "'static'", "set activations: none"]),
        ("model.id=''", ["model.id", "got ''"]),
        ("model={}", ["model.id", "required"]),
        ("calibration.samples=0", ["calibration.samples", "got 0"]),
        ("gates.perplexity_increase=0", ["gates.perplexity_increase", "got 0"]),
        ("evaluation.suites=piqa", ["evaluation.suites", "'piqa'"]),
        ("evaluation.timeout=auto", ["evaluation.timeout", "'auto'"]),
        ("evaluation.num_fewshot={piqa: 5}", ["num_fewshot names piqa", "not among the suites"]),
        ("gates.confidence=95", ["gates.confidence", "got 95"]),
        ("calibration.propagation=layers", ["calibration.propagation", "'groups'", "got 'layers'"]),
        (
            "calibration.correction=2",
            ["calibration.correction", "less than or equal to 1", "got 2"],
        ),
        (
            "calibration.correction=0.5",
            ["correction is 0.5", "original", "set propagation: groups"],
        ),
    ],
)
def test_error_names_file_field_and_value_on_one_line(recipe_file, override, parts):
    message = message_of(recipe_file, [override])
    for part in [str(recipe_file), *parts]:
        assert part in message


@pytest.mark.parametrize("fed", ["quantized", "groups"])
def test_blocks_that_wait_are_not_passed_together(recipe_file, fed):
    settings = [f"calibration.propagation={fed}", "execution.blocks_per_task=2"]
    said = f"blocks_per_task is 2, and with calibration.propagation: {fed} a block waits"
    assert said in message_of(recipe_file, settings)


def test_a_recipe_without_a_correction_is_the_same_as_before_there_was_one(recipe_file):
    before = load_recipe(recipe_file)
    assert load_recipe(recipe_file, ["calibration.correction=0"]).digest == before.digest
    groups = load_recipe(recipe_file, ["calibration.propagation=groups"])
    corrected = ["calibration.propagation=groups", "calibration.correction=0.5"]
    assert load_recipe(recipe_file, corrected).digest not in (groups.digest, before.digest)


def test_further_errors_are_counted(recipe_file):
    assert "(and 1 more)" in message_of(recipe_file, ["scheme.a=1", "scheme.group_size=0"])


def test_missing_file(tmp_path):
    assert message_of(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such recipe"


@pytest.mark.parametrize(
    ("text", "part"),
    [("model: [1,\n  2\nscheme: {", "not YAML"), ("- a\n- b\n", "not list"), ("", "not NoneType")],
)
def test_bad_yaml(tmp_path, text, part):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = message_of(path)
    assert str(path) in message
    assert part in message


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("scheme.group_size=32", lambda r: r.scheme.group_size, 32),
        ("scheme.symmetric=true", lambda r: r.scheme.symmetric, True),
        (
            "calibration.dataset.split=validation",
            lambda r: r.calibration.dataset.split,
            "validation",
        ),
        ("evaluation.suites=[piqa, boolq]", lambda r: r.evaluation.suites, ["piqa", "boolq"]),
        ("calibration.dataset.data_files=", lambda r: r.calibration.dataset.data_files, None),
        ("registry.name=a=b", lambda r: r.registry.name, "a=b"),
        ("variants.rtn={method: rtn}", lambda r: r.variants, {"rtn": {"method": "rtn"}}),
    ],
)
def test_overrides(recipe_file, override, read, value):
    assert read(load_recipe(recipe_file)) != value
    recipe = load_recipe(recipe_file, [override])
    assert read(recipe) == value
    assert recipe.model.id == "org/model"  # and the rest stays


def test_last_override_wins(recipe_file):
    overrides = ["scheme.group_size=32", "scheme.group_size=16"]
    assert load_recipe(recipe_file, overrides).scheme.group_size == 16


@pytest.mark.parametrize(
    "override",
    [
        "scheme.group_size",
        "=3",
        "",
        "model.id.name=3",
        "scheme.group_size=[1",  # not YAML
        "scheme.group_size={a: b: c}",
    ],
)
def test_bad_override_is_quoted(recipe_file, override):
    assert repr(override) in message_of(recipe_file, [override])


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAEXAMPLE:plan/ted@models/llama",
        "s3://planted@models/llama",
        "https://someone:planted@mirror.example/lm-eval",
        "https://mirror.example:8443/a?X-Amz-Signature=planted",
        "https://mirror.example/a?sv=1&sig=planted",
        "https://mirror.example/a?access_token=planted",
    ],
)
@pytest.mark.parametrize(
    ("field", "where"),
    [
        ("model.id", "model.id"),
        ("evaluation.data_mirror", "evaluation.data_mirror"),
        ("evaluation.data_miror", "evaluation.data_miror"),  # no field of ours
        ("calibration.dataset.data_files", "calibration.dataset.data_files"),
        ("variants.rtn.method", "variants.rtn.method"),
    ],
)
def test_an_address_with_credentials_is_refused_and_not_repeated(
    recipe_file, address, field, where
):
    content = yaml.safe_load(recipe_file.read_text())
    node = content
    *parents, last = field.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = [address] if last == "data_files" else address
    other = recipe_file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(content))
    for arguments in ([other], [recipe_file, [f"{field}={address}"]]):
        message = message_of(*arguments)
        assert f"{where}: an address with a password or token in it" in message
        assert "AWS_SECRET_ACCESS_KEY" in message
        assert "plan" not in message
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(content)  # as Prefect does
    assert "plan" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "s3://models/llama@v2",
        "https://mirror.example:8443/lm-eval@2",
        "s3://a/b?versionId=3",
        "someone@example.com",
    ],
)
def test_an_address_without_credentials_is_taken(recipe_file, address):
    assert load_recipe(recipe_file, [f"model.id={address}"]).model.id == address


def test_paths_beside_the_recipe(recipe_file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe_file).calibration.dataset.data_files == "corpus.txt"  # is not there
    (recipe_file.parent / "corpus.txt").touch()
    (recipe_file.parent / "org" / "model").mkdir(parents=True)
    recipe = load_recipe(recipe_file)
    assert recipe.calibration.dataset.data_files == str(recipe_file.parent / "corpus.txt")
    assert recipe.model.id == str(recipe_file.parent / "org" / "model")
    assert recipe.calibration.dataset.path == "text"  # a builder, not a file


def test_paths_of_overrides_are_the_callers(recipe_file, monkeypatch, tmp_path):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe(recipe_file, ["model.id=mine"]).model.id == str(tmp_path / "mine")
    assert load_recipe(recipe_file, ["model.id=hub/mine"]).model.id == "hub/mine"


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("execution.workers=7", True),
        ("execution.device=cpu", True),
        ("variants.rtn={method: rtn}", True),
        ("scheme.method=dpq", True),  # the default, spelled out
        ("scheme.group_size=32", False),
        ("scheme.rounding=nearest", False),
        ("calibration.samples=7", False),
        ("evaluation.limit=7", False),
        ("gates.accuracy_drop=7", False),
        ("model.revision=main", False),
        ("benchmark.batches=[1]", True),  # of a benchmark that a release does not run
        ("benchmark.devices=[cpu]", False),
    ],
)
def test_digest_is_of_everything_but_execution(recipe_file, override, same):
    changed = load_recipe(recipe_file, [override])
    assert (changed.digest == load_recipe(recipe_file).digest) is same


def test_digest_does_not_depend_on_the_order_of_keys():
    backwards = {key: CONTENT[key] for key in reversed(CONTENT)}
    assert parse_recipe(backwards).digest == parse_recipe(CONTENT).digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mixed_in": [OTHER | {"share": 0.5}] * 2}, r"mixed_in \(0.5, 0.5\) sum to 1, and"),
        ({"mixed_in": [OTHER | {"share": 1}]}, "mixed_in.0.share: Input should be less than 1"),
        ({"samples": 4, "mixed_in": [OTHER | {"share": 0.1}]}, "of 4 samples a share of mixed_in"),
        ({"dataset": OTHER | {"text_column": "a", "messages_column": "b"}}, "one or the other"),
        ({"image_column": "i", "activations": {"dataset": OTHER}}, "leave activations out"),
        ({"image_column": "i", "mixed_in": [OTHER | {"share": 0.5}]}, "leave mixed_in out"),
        (
            {"image_column": "i", "dataset": OTHER | {"messages_column": "b"}},
            "leave dataset.messages_column out",
        ),
    ],
)
def test_data_sets_that_do_not_go_together(changes, said):
    content = {**CONTENT, "calibration": {**CONTENT["calibration"], **changes}}
    with pytest.raises(RecipeError, match=said):
        parse_recipe(content)


def test_a_recipe_without_other_data_sets_is_what_it_was_before_there_were_any():
    recipe = parse_recipe(CONTENT)
    written = recipe.model_dump(mode="json")
    assert {"mixed_in", "activations"}.isdisjoint(written["calibration"])
    assert "messages_column" not in written["calibration"]["dataset"]
    changed = {"dataset": OTHER | {"messages_column": "said"}, "activations": {"dataset": OTHER}}
    other = parse_recipe({**CONTENT, "calibration": changed})
    assert other.digest != recipe.digest
    assert parse_recipe(other.model_dump(mode="json")) == other


def test_shares_are_of_all_samples():
    mixed = [OTHER | {"share": share} for share in (0.25, 0.1)]
    section = {**CONTENT["calibration"], "samples": 128, "mixed_in": mixed}
    section = parse_recipe({**CONTENT, "calibration": section}).calibration
    assert [windows for _, windows in section.windows_of] == [83, 32, 13]


def test_recipes_cannot_be_changed():
    recipe = parse_recipe(CONTENT)
    with pytest.raises(ValueError, match="frozen"):
        recipe.scheme.group_size = 8


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gates: {}\nmodel: {id: a/b}\ngates: {accuracy_drop: 1}\n", "lines 1 and 3: 'gates'"),
        ("gates:\n  accuracy_drop: 1\n  accuracy_drop: 2\n", "lines 2 and 3: 'accuracy_drop'"),
        ("export: [{a: 1, a: 2}]\n", "line 1: 'a' is given twice"),
    ],
)
def test_a_key_given_twice_is_refused_with_its_lines(tmp_path, text, part):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    assert part in message_of(path)


def test_a_merged_key_may_be_given_again(tmp_path, recipe_file):
    path = tmp_path / "merged.yaml"
    path.write_text(
        f"{recipe_file.read_text()}gates: {{<<: &g {{accuracy_drop: 2}}, mode: relative}}\n"
    )
    assert load_recipe(path).gates.accuracy_drop == 2


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("execution.store=/a #b", lambda r: r.execution.store, "/a #b"),
        ("execution.store=#b", lambda r: r.execution.store, "#b"),
        ("execution.store=a: b", lambda r: r.execution.store, "a: b"),
        ("execution.store=*", lambda r: r.execution.store, "*"),
        ("registry.name=it's", lambda r: r.registry.name, "it's"),
        ("registry.name='3'", lambda r: r.registry.name, "3"),
        ("model.revision=2024-01-02", lambda r: r.model.revision, "2024-01-02"),
        ("layers.model.layers.0.mlp.up_proj=w8a8", lambda r: r.layers, {UP: "w8a8"}),
        (f'layers."{UP}"=w8a8', lambda r: r.layers, {UP: "w8a8"}),
        ('variants."w4.5".method=rtn', lambda r: r.variants, {"w4.5": {"method": "rtn"}}),
        ("execution.workers=", lambda r: r.execution.workers, None),
        ("execution.workers=3", lambda r: r.execution.workers, 3),
        ("gates.accuracy_drop=0.25", lambda r: r.gates.accuracy_drop, 0.25),
    ],
)
def test_a_setting_is_taken_as_it_is_written(recipe_file, override, read, value):
    assert read(load_recipe(recipe_file, ["execution.workers=5", override])) == value


@pytest.mark.parametrize(
    "override",
    ["registry={name: a #b}", "registry={name: a, name: b}", 'registry.name="a" b', "a..b=1"],
)
def test_a_setting_of_which_something_would_be_dropped_is_refused(recipe_file, override):
    assert repr(override) in message_of(recipe_file, [override])


@pytest.mark.parametrize(
    "override",
    ["scheme.bits=8", "scheme={method: gptq, inner: none, activations: none}"],
)
def test_what_a_disabled_repair_would_do_refuses_nothing(recipe_file, override):
    assert not load_recipe(recipe_file, [override]).repair.enabled


def test_repair_names_a_choice_that_does_not_go_with_the_scheme(recipe_file):
    scheme = "scheme={method: gptq, inner: none, activations: none}"
    message = message_of(recipe_file, [scheme, "repair.enabled=true"])
    assert "repair.candidates.w8a8: bits is 8 but inner is 'none'" in message
    assert "pydantic" not in message


def test_layers_of_eight_bits_can_be_kept_in_sixteen(recipe_file):
    recipe = load_recipe(recipe_file, ["scheme.bits=8", f"layers.{UP}=bf16"])
    assert recipe.layers == {UP: "bf16"}


def test_names_too_long_for_a_file_are_an_error_of_ours(recipe_file):
    assert "name too long" in message_of("x" * 300).lower()
    assert load_recipe(recipe_file, [f"model.id={'x' * 300}"]).model.id == "x" * 300


@pytest.mark.parametrize(
    ("gate", "value", "section"),
    [
        ("divergence", 0.02, "perplexity"),
        ("top1_agreement", 0.97, "perplexity"),
        ("flips", 3, "suites"),
    ],
)
def test_a_gate_needs_what_it_judges(gate, value, section):
    there = {"perplexity": {"dataset": {"path": "json"}}, "suites": ["piqa"]}
    asked = CONTENT | {"gates": {gate: value}, "evaluation": there}
    assert getattr(parse_recipe(asked).gates, gate) == value
    without = {name: found for name, found in there.items() if name != section}
    said = rf"gates\.{gate} is {value:g}, .* add evaluation\.{section}, or leave the gate out"
    with pytest.raises(RecipeError, match=said):
        parse_recipe(asked | {"evaluation": without})


@pytest.mark.parametrize("gate", ["divergence", "top1_agreement", "flips"])
@pytest.mark.parametrize("value", [0, -1, "much", math.inf])
def test_a_gate_out_of_bounds_is_refused(gate, value):
    with pytest.raises(RecipeError, match=rf"gates\.{gate}"):
        parse_recipe(CONTENT | {"gates": {gate: value}})


def test_gates_that_nobody_asks_for_leave_the_digest_as_it_was():
    """Recipes of before these gates, and of before hubs, keep their releases."""
    plain = parse_recipe(CONTENT)
    left_out = {"execution", "variants", "benchmark"}
    content = plain.model_dump(mode="json", exclude=left_out)
    known = {"perplexity_increase", "accuracy_drop", "mode", "confidence", "allow_limited"}
    known |= {"approval", "approval_timeout"}
    content["gates"] = {name: v for name, v in content["gates"].items() if name in known}
    del content["registry"]["hub"]
    del content["attest"]
    assert plain.digest == digest(content)
    there = {"perplexity": {"dataset": {"path": "json"}}}
    asked = parse_recipe(CONTENT | {"evaluation": there, "gates": {"divergence": 0.02}})
    assert asked.digest != parse_recipe(CONTENT | {"evaluation": there}).digest


def test_a_cache_that_nobody_asks_for_is_not_written():
    """Digests, layers and checkpoints of before there was one stay."""
    plain = Scheme()
    assert not [name for name in plain.model_dump() if name.startswith("kv_cache")]
    assert Scheme(kv_cache="none") == plain
    asked = Scheme(kv_cache="fp8", kv_cache_scale="head")
    assert asked.model_dump(mode="json")["kv_cache"] == "fp8"
    assert Scheme.model_validate(asked.model_dump()) == asked
    assert asked.of_layers == plain  # layers are those of a recipe without it
    recipe, other = (
        parse_recipe(CONTENT | {"scheme": each.model_dump()}) for each in (plain, asked)
    )
    assert recipe.digest == parse_recipe(CONTENT | {"scheme": {}}).digest != other.digest


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (
            {"kv_cache_scale": "head"},
            r"kv_cache_scale is 'head' but kv_cache is 'none'.*kv_cache: fp8",
        ),
        ({"kv_cache": "int8"}, r"scheme\.kv_cache: .*'none' or 'fp8'"),
        (
            {"kv_cache": "fp8", "kv_cache_scale": "token"},
            r"scheme\.kv_cache_scale: .*'tensor' or 'head'",
        ),
    ],
)
def test_a_cache_that_is_not_there_is_refused(scheme, said):
    with pytest.raises(RecipeError, match=said):
        parse_recipe(CONTENT | {"scheme": scheme})

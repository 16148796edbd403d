"""The release report as a page: structure, escaping, numbers, every verdict. No service."""

import math
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from lxml.html import HTMLParser, document_fromstring

from dpq_core.benchmark.throughput import Cell, Times
from dpq_core.evaluation.text_divergence import Spot
from dpq_core.recipe import parse_recipe
from dpq_core.recipe.scheme import Scheme
from dpq_core.verdict.closeness import NATS, SHARE, TOP1
from dpq_core.verdict.flips import OF_ANSWERS
from dpq_core.verdict.gates import Verdict
from dpq_core.verdict.ratios import ratio_metric
from dpq_core.verdict.standing import Metric
from flows.reporting.page import THROUGHPUT, page
from flows.reporting.report_data import ReportData
from infra.registry.history import PastVersion
from tasks.support.report_figures import layers_figure, worst_layers

HOSTILE = ["<script>alert(1)</script>", '"><img src=x>', r"$\frac{$", "a & <b>"]
VERDICTS = ["promoted", "rejected", "inspected", "withheld"]


def layer(name, error, **changes):
    row = {"name": name, "shape": [256, 128], "bytes": 17_000, "scheme": {}, "error": error}
    return row | {"damp_frac": 0.01, "codes_moved": 3, "tokens": 4096, "kept": ""} | changes


def recipe_of(**sections):
    dataset = {"path": "json", "data_files": "text.jsonl"}
    content = {
        "model": {"id": "models/small"},
        "calibration": {"dataset": dataset},
        "evaluation": {"perplexity": {"dataset": dataset}, "suites": ["piqa", "mmlu"]},
    }
    return parse_recipe(content | sections)


def metric(name, baseline, delta, limit=None, **changes):
    interval = (delta - 0.1, delta + 0.1)
    found = Metric(name, baseline, baseline + delta, delta, interval, documents=1838, limit=limit)
    if limit is None:
        return replace(found, passed=True, **changes)
    shown = abs(delta) + 0.1 < limit
    needed = None if shown else 2 * found.documents
    word = "shown" if shown else "not shown"
    return replace(found, passed=True, standing=word, needed=needed, **changes)


METRICS = {
    "perplexity_token": metric("perplexity_token", 5.4721, 0.0412, 0.05),
    "accuracy_average": metric("acc", 78.1, -0.2, 0.5),
    "accuracy.piqa": metric("acc", 78.1, -0.2, turned_right=8, turned_wrong=12, p_value=0.5),
    "accuracy.mmlu": metric("acc", 45.3, -0.3, 0.5, truncated=7),
}
LAYERS = [
    layer(f"model.layers.{block}.{kind}", 0.001 * (1 + block) * (1 + place))
    for block in range(6)
    for place, kind in enumerate(("self_attn.q_proj", "mlp.down_proj"))
]
MANIFEST = {
    "base_model": {
        "id": "small",
        "revision": None,
        "digest": "ab" * 32,
        "trust_remote_code": False,
    },
    "scheme": Scheme().model_dump(mode="json"),
    "calibration": {"windows": "cd" * 32, "tokens": 3_072, "tokens_asked": 4_096},
    "bytes_per_weight": 0.5336,
    "layers": LAYERS,
    "skipped": {"lm_head": "output head, kept in 16 bits"},
}
FULL = ReportData(
    made=datetime(2026, 11, 21, 12, 30, tzinfo=UTC),
    recipe=recipe_of(),
    name="small-w4a8",
    version=3,
    verdict=Verdict("promoted", (), METRICS),
    previous_champion=2,
    manifest=MANIFEST,
    checkpoint="/store/checkpoints/ef",
    checkpoint_sha256="ef" * 32,
    run="runs:/0123",
    sizes=(1_300_000, 400_000),
    bytes_by_part={"embedding and head, tied": 300_000, "attention": 40_000, "MLP": 60_000},
    checks={"tensors": None, "reload": None},
    past=[
        PastVersion(
            number,
            datetime(2026, 11, number, tzinfo=UTC),
            verdict,
            number == 1,
            {
                "perplexity_token.baseline": 5.4721,
                "perplexity_token.delta": 0.04 + number / 100,
                "accuracy_average.candidate": 78.0 - number,
                "bytes_per_weight": 0.5336,
            },
        )
        for number, verdict in ((1, "promoted"), (2, "rejected"), (3, "promoted"))
    ],
    rounds=[
        {"round": 0, "bits per weight": 4.2, "predicted increase": None, "verdict": "rejected"},
        {"round": 1, "bits per weight": 4.4, "predicted increase": 0.04, "verdict": "promoted"},
    ],
    exports=[
        {
            "format": "gptq",
            "bits per weight": 4.2,
            "bytes": 390_000,
            "verification": "passed",
            "sha256": "12" * 32,
        }
    ],
    parts={
        "mmlu": [
            {"level": "category", "name": "STEM", "documents": 30, "baseline": 45.0, "delta": -0.2}
        ]
    },
    environment={"Hardware": {"processor": "a processor"}},
    speeds=[
        Times(
            "cpu",
            "a processor",
            bandwidth=2e10,
            product_rate=1e12,
            product_limit=5000.0,
            cells=(
                Cell("bf16", 1, 0.02, 6400.0, 0.01, 100.0, 1_000_000_000, 200.0),
                Cell("bf16", 8, limit=1600.0, wrong="out of memory: no more"),
                Cell("w4a8", 1, 0.01, 12800.0, 0.004, 250.0, 400_000_000, 500.0),
                Cell("w4a8", 8, 0.08, 12800.0, 0.005, 1600.0, 500_000_000, 4000.0),
            ),
            notes=("w4a8: runtime cpu",),
        ),
        Times("cuda", wrong="not measured here: this machine has no cuda device"),
    ],
)
NOT_FINITE = replace(
    FULL,
    verdict=Verdict(
        "rejected",
        ("perplexity_token: not finite",),
        METRICS
        | {
            "perplexity_token": Metric(
                "perplexity_token", 5.4, math.inf, wrong="not finite", limit=0.05
            ),
            "accuracy.piqa": Metric("acc", 78.1, math.nan, wrong="candidate failed: TimeoutError"),
        },
    ),
    manifest=MANIFEST
    | {
        "layers": [
            *LAYERS,
            layer("model.layers.6.mlp.down_proj", math.nan),
            layer("model.layers.6.self_attn.q_proj", 0.0, scheme={"bits": 8}),
        ]
    },
)
APART = replace(
    FULL,
    verdict=Verdict(
        "rejected",
        ("top1_agreement: less",),
        METRICS
        | {
            "divergence": metric(NATS, 0.0, 0.0312),
            "divergence.max": replace(metric(NATS, 0.0, 9.5), interval=None),
            TOP1: replace(metric(SHARE, 1.0, -0.04, 0.98), passed=False, standing="failed"),
            "accuracy.piqa": replace(
                METRICS["accuracy.piqa"],
                turned_other=3,
                margin=7.6,
                margin_candidate=7.5,
                margin_turned=0.63,
            ),
            "flips": metric(OF_ANSWERS, 0.0, 3.59),
            "flips.mmlu": metric(OF_ANSWERS, 0.0, 2.0),
        },
    ),
    spots=[
        Spot("ab" * 32, 20, 9.5, False, "the first\nline of ", "text", " goes\x00 on"),
        Spot("ab" * 32, 40, math.inf, True, "", "token 5", ""),
    ],
)
BARE = replace(
    FULL,
    verdict=Verdict("rejected", ("integrity: tensors: one is missing",), {}),
    previous_champion=None,
    checks={"tensors": "one is missing"},
    past=FULL.past[:1],
    rounds=[],
    exports=[],
    parts={},
    environment={},
    speeds=[],
    manifest=MANIFEST | {"layers": LAYERS[:1], "skipped": {}},
    recipe=recipe_of(evaluation={}),
)


@dataclass(frozen=True)
class Example:
    data: ReportData
    html: str
    tree: Any


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(data, id=name)
        for name, data in (
            ("full", FULL),
            ("not-finite", NOT_FINITE),
            ("apart", APART),
            ("bare", BARE),
        )
    ],
)
def example(request):
    html = page(request.param)
    return Example(request.param, html, parsed(html))


def parsed(html):
    return document_fromstring(html, parser=HTMLParser(recover=False, huge_tree=True))


def tree_of(data):
    return parsed(page(data))


def text_of(node):
    return " ".join(node.text_content().split())


def section(tree, title):
    """What stands between a heading and the next of its kind."""
    (heading,) = tree.xpath(f"//h2[text()='{title}']")
    nodes = []
    for node in heading.itersiblings():
        if node.tag == "h2":
            break
        nodes.append(node)
    return " ".join(text_of(node) for node in nodes)


def test_headings_language_and_the_verdict_first(example):
    data, tree = example.data, example.tree
    assert tree.get("lang") == "en"
    assert tree.xpath("//meta[@name='viewport']")
    levels = [int(node.tag[1]) for node in tree.xpath("//h1 | //h2 | //h3")]
    assert levels[:2] == [1, 2]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert text_of(tree.xpath("//h1")[0]) == f"{data.verdict.verdict} small-w4a8 version 3"
    assert tree.xpath("//h2")[0].text == "Gates"


def test_tables_are_tables_to_a_screen_reader(example):
    tables = example.tree.xpath("//table")
    assert tables
    for table in tables:
        assert text_of(table.xpath("caption")[0])
        columns = table.xpath("thead/tr/th[@scope='col']")
        assert all(text_of(column) for column in columns)
        for row in table.xpath("tbody/tr"):
            assert [cell.tag for cell in row] == ["th", *["td"] * (len(columns) - 1)]
            assert row[0].get("scope") == "row"
            assert [cell.get("data-title") for cell in row[1:]] == [
                text_of(column) for column in columns[1:]
            ]


def test_charts_are_named_and_stand_beside_their_numbers(example):
    tree = example.tree
    for drawing in tree.xpath("//svg"):
        image = drawing.getparent()
        assert image.get("role") == "img"
        caption = text_of(image.getparent().xpath("figcaption")[0])
        assert image.get("aria-label") == f"Chart: {caption}"
    assert (
        tree.xpath("//figure")[0].xpath("following::table//caption")[0].text.startswith("The lay")
    )
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))
    used = {link.removeprefix("#") for link in tree.xpath("//@*[name()='xlink:href']")}
    assert used <= set(ids)


def test_nothing_is_fetched_and_nothing_runs(example):
    tree, html = example.tree, example.html
    links = tree.xpath("//@src | //@href | //@*[name()='xlink:href'] | //@action | //@data")
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not tree.xpath("//script | //link | //iframe | //object | //form | //base")
    assert not [name for name in tree.xpath("//@*") if getattr(name, "attrname", "")[:2] == "on"]
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    (policy,) = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert html == page(example.data)


def test_numbers_that_are_none_are_words(example):
    shown = text_of(example.tree.xpath("//main")[0])
    assert not re.search(r"\b(nan|inf|None)\b", shown)


@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_is_shown_as_it_is(name):
    odd = replace(
        FULL,
        name=name,
        verdict=replace(FULL.verdict, reasons=(name,)),
        manifest=MANIFEST
        | {"layers": [*LAYERS, layer(name, 0.5)], "skipped": {name: name}}
        | {"base_model": MANIFEST["base_model"] | {"id": name, "revision": name}},
        environment={name: {name: name}},
    )
    tree = tree_of(odd)
    assert not tree.xpath("//script | //img | //b")
    assert text_of(tree.xpath("//title")[0]).endswith(f"{name} version 3")
    assert text_of(tree.xpath("//header//li")[0]) == name
    assert text_of(tree.xpath("//td[@data-title='layer']")[0]) == name
    assert text_of(tree.xpath("//dt")[-1]) == name
    assert name.rpartition(".")[2] in [text_of(node) for node in tree.xpath("//svg//text")]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_every_verdict_says_who_is_champion_and_how_to_roll_back(verdict):
    data = replace(FULL, verdict=Verdict(verdict, ("a reason",), METRICS), past=[])
    tree = tree_of(data)
    said = section(tree, "Champion and rollback")
    commands = [text_of(node) for node in tree.xpath("//pre")]
    if verdict == "promoted":
        assert "Version 3 is champion of small-w4a8 now. Before it: version 2." in said
        assert commands == ['dpq rollback small-w4a8 --why "…"']
    else:
        assert "Version 2 is champion of small-w4a8; this release did not change it." in said
        assert commands == []
    assert tree.xpath("//header/@class") == [verdict]


@pytest.mark.parametrize("verdict", VERDICTS)
def test_without_a_champion_before_there_is_nothing_to_roll_back_to(verdict):
    data = replace(FULL, verdict=Verdict(verdict, (), METRICS), previous_champion=None, past=[])
    tree = tree_of(data)
    assert not tree.xpath("//pre")
    first = verdict == "promoted"
    expected = "There was none before" if first else "There is no champion of small-w4a8"
    assert expected in section(tree, "Champion and rollback")


def test_the_gate_table_and_the_suites():
    tree = tree_of(FULL)
    gates, suites = tree.xpath("//table")[:2]
    assert [text_of(cell) for cell in gates.xpath("thead//th")] == [
        *("metric", "baseline", "candidate", "delta", "interval of delta", "limit", "result")
    ]
    assert [text_of(cell) for cell in gates.xpath("tbody/tr")[0]][:-1] == [
        *("perplexity_token", "5.4721", "5.5133", "+0.0412", "−0.0588 to +0.1412", "0.05")
    ]
    assert [text_of(row[0]) for row in gates.xpath("tbody/tr")] == [
        *("perplexity_token", "accuracy_average (acc)", "accuracy.mmlu (acc)")
    ]
    assert [text_of(cell) for cell in suites.xpath("tbody/tr")[0]][:6] == [
        *("piqa", "78.10", "77.90", "−0.20", "−0.30 to −0.10", "+8 −12, p 0.5")
    ]
    unshown = "1 not shown (perplexity_token: about 3,700 windows would show it)"
    said = f"Gates: 2 shown, {unshown}, 0 failed. Judged on all documents"
    assert said in section(tree, "Gates")
    results = [text_of(row[-1]) for row in gates.xpath("tbody/tr")]
    assert results == ["not shown", "shown", "shown"]
    colours = [row[-1].get("class").split()[-1] for row in gates.xpath("tbody/tr")]
    assert colours == ["unsure", "passed", "passed"]
    assert "it reads the text that perplexity judges" in section(tree, "Skipped")


def test_divergence_and_where_the_text_is_farthest():
    tree = tree_of(APART)
    table = tree.xpath("//h2[text()='Divergence']/following::table")[0]
    assert [[text_of(cell) for cell in row] for row in table.xpath("tbody/tr")] == [
        ["KL in nats a token, mean", "0.03120", "−0.06880 to 0.13120"],
        ["largest", "9.50000", "–"],
        ["share of tokens with the same most likely", "0.96000", "0.86000 to 1.06000"],
    ]
    spots = tree.xpath("//ol[@class='spots']/li")
    assert text_of(spots[0]) == (
        "9.500 nats, most likely token another: the first⏎line of text goes· on"
    )
    assert text_of(spots[0].xpath(".//mark")[0]) == "text"
    assert text_of(spots[1]) == "infinite nats, most likely token the same: token 5"
    assert "3.59 % of the suites' answers changed (3.49 to 3.69)." in section(tree, "Accuracy")
    assert "2.00 % of MMLU's answers changed (1.90 to 2.10)." in section(tree, "Accuracy")
    flips = tree.xpath("//table[caption='Answers that changed']/tbody/tr")
    assert [[text_of(cell) for cell in row] for row in flips] == [
        ["piqa", "8", "12", "3", "0.630", "7.600", "7.500"]
    ]
    assert "divergence" not in section(tree, "Gates")  # no gate looks
    assert not tree_of(FULL).xpath("//h2[text()='Divergence']")
    assert "Divergence from the 16-bit model: not measured" in section(tree_of(FULL), "Skipped")


@pytest.mark.parametrize("text", [*HOSTILE, "\u202egnp.exe", "</mark></q>"])
def test_any_spot_of_the_text_is_shown_as_it_is(text):
    spot = Spot("ab", 3, 1.0, True, text, text, text)
    tree = tree_of(replace(APART, spots=[spot]))
    assert not tree.xpath("//script | //img | //b")
    (mark,) = tree.xpath("//mark")
    assert mark.text == text.replace("\u202e", "·")
    assert mark.getparent().text_content() == 3 * mark.text


def test_a_gate_on_agreement_is_no_accuracy_of_the_history():
    past = [replace(v, metrics={**v.metrics, THROUGHPUT: 100.0}) for v in FULL.past]
    tree = tree_of(replace(APART, past=past))
    history = section(tree, "Versions of this model")
    assert "accuracy_average against tokens per second" in history
    titles = [text_of(cell) for cell in tree.xpath("//table[.//th='registered']/thead//th")]
    assert "top1_agreement, delta" in titles
    assert "top1_agreement, baseline" not in titles


def test_a_failed_suite_is_shown_as_failed():
    tree = tree_of(NOT_FINITE)
    row = tree.xpath("//table")[1].xpath("tbody/tr")[0]
    assert [text_of(cell) for cell in row][:4] == ["piqa", "78.10", "not a number", "missing"]
    assert "accuracy.piqa: candidate failed: TimeoutError" in section(tree, "Accuracy")
    assert "infinite" in [text_of(cell) for cell in tree.xpath("//table")[0].iter("td")]


def test_worst_layers_come_first_and_what_is_not_finite_is_worst():
    tree = tree_of(NOT_FINITE)
    names = [text_of(cell) for cell in tree.xpath("//td[@data-title='layer']")]
    assert len(names) == 10
    assert names[:2] == ["model.layers.6.mlp.down_proj", "model.layers.5.mlp.down_proj"]
    said = section(tree, "Layers")
    assert "Without error, on the axis: 1. Not finite, at the top: 1." in said


def test_what_was_skipped_is_listed():
    limited = recipe_of(evaluation={"suites": ["piqa"], "limit": 5}, export=["gptq"])
    said = section(tree_of(replace(FULL, recipe=limited, exports=[])), "Skipped")
    for part in (
        "Calibration: 3,072 of 4,096 tokens asked for, 24 for each of the widest",
        "Not quantized: lm_head (output head, kept in 16 bits)",
        "accuracy.mmlu: 7 requests were longer",
        "the first 5 of each suite",
        "Perplexity: not measured",
        "Throughput: not measured",
        "Exports (gptq): not written",
    ):
        assert part in said


@pytest.mark.parametrize("count", [0, 1, 3])
def test_throughput_appears_once_a_version_has_it(count):
    past = [
        replace(version, metrics=version.metrics | {THROUGHPUT: 1000.0 * version.number})
        for version in FULL.past[:count]
    ]
    tree = tree_of(replace(FULL, past=[*past, *FULL.past[count:]]))
    said = section(tree, "Versions of this model")
    cells = [text_of(cell) for cell in tree.xpath("//td[@data-title='tokens per second']")]
    assert ("Throughput: not measured" in said) == (count == 0)
    assert cells == (["not measured"] * (3 - count) + ["3,000", "2,000", "1,000"][-count:]) * (
        count > 0
    )
    assert ("accuracy_average against tokens per second of the 3 versions" in said) == (count == 3)
    assert "Throughput: not measured in this release" in section(tree, "Skipped") or count == 3


def test_speeds_have_a_table_a_chart_and_their_conditions():
    tree = tree_of(FULL)
    (table,) = tree.xpath("//h2[text()='Throughput']/following::table[1]")
    rows = [[text_of(cell) for cell in row] for row in table.xpath("tbody/tr")]
    assert rows[0][:5] == ["cpu", "bf16", "1", "100.0", "1.00"]
    assert rows[1][3:5] == ["out of memory: no more", "–"]
    assert rows[2][3:] == ["250.0", "2.50", "500.0", "4.00", "12,800", "10.0", "0.40"]
    assert rows[3][4] == "–"  # there is no BF16 to compare with
    assert rows[4][:4] == ["cuda", "–", "–", "not measured here: this machine has no cuda device"]
    said = section(tree, "Throughput")
    assert "Decoding on cpu, tokens a second against sequences at a time. Most: 1,600" in said
    assert "copy 20.0 GB/s" in said
    assert not tree_of(BARE).xpath("//h2[text()='Throughput']")


def test_a_speed_gate_is_in_the_gate_table_and_no_measure_of_quality():
    ratio = ratio_metric("decoding", 2.5, 1.8)
    metrics = {"perplexity_token": METRICS["perplexity_token"], "throughput_ratio.cpu": ratio}
    gates = {"throughput_ratio": 1.8}
    recipe = recipe_of(gates=gates, benchmark={"devices": ["cpu"]})
    speeds = {THROUGHPUT: 250.0}
    past = [replace(v, metrics={**v.metrics, **speeds}) for v in FULL.past]
    tree = tree_of(
        replace(FULL, recipe=recipe, past=past, verdict=Verdict("promoted", (), metrics))
    )
    row = [text_of(cell) for cell in tree.xpath("//table")[0].xpath("tbody/tr")[1]]
    assert row[:4] == ["throughput_ratio.cpu (decoding)", "1.0000", "2.5000", "+1.5000"]
    assert row[-2:] == ["1.8", "shown"]
    assert "Of throughput_ratio what reaches its limit passes" in section(tree, "Gates")
    versions = section(tree, "Versions of this model")
    assert "perplexity_token, candidate minus baseline against tokens per second" in versions
    assert "throughput_ratio" not in versions


def test_colours_can_be_read_in_both_schemes():
    light, dark = re.findall(r":root \{[^}]*?(--page[^}]*)\}", page(FULL))
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w+);", scheme))
        for name in ("text", "quiet", "failed", "passed", "other"):
            assert contrast(colours[name], colours["page"]) >= 4.5  # WCAG 2.2, 1.4.3


def contrast(first, second):
    """Ratio of two sRGB colours' relative luminances, by WCAG 2.2."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, bright = sorted((luminance(first), luminance(second)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [336, 720])
@pytest.mark.parametrize("blocks", [1, 32, 600])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_ranks_stand_apart_above_the_chart(blocks, spread, width):
    errors = {
        f"model.layers.{block}.mlp.{kind}": 1e-3 * math.exp(spread * math.sin(7 * block + place))
        for block in range(blocks)
        for place, kind in enumerate(("gate_proj", "up_proj", "down_proj"))
    }
    ranked = worst_layers(errors, 10)
    figure = layers_figure(errors, ranked, width)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [text for text in axes.texts if text.get_text().isdigit()]
    assert {text.get_text() for text in labels} == {str(i + 1) for i in range(len(ranked))}
    spans = sorted(text.get_position()[0] for text in labels)
    assert all(after - before > 14 for before, after in pairwise(spans))
    assert spans[0] >= 0
    assert spans[-1] <= width

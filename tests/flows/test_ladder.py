"""The ladder as text, as Markdown, as records and as a page: pure functions, no service."""

import math
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from lxml.html import HTMLParser, document_fromstring
from markdown_it import MarkdownIt
from matplotlib.text import Text

from flows.reporting.ladder import Row, as_records, cells, columns, html, markdown
from tasks.support.figures import ladder_figure

BASELINE = Row("bf16", 5.0, 0.0, None, 16.0, 0.0, {"accuracy.piqa (acc)": 57.1})
RTN = Row("rtn-w4a16", 5.44, 0.44, (0.4, 0.48), 4.67, 0.006, {"accuracy.piqa (acc)": 55.0})
DPQ = Row("dpq-gar", 5.25, 0.25, (0.2, 0.3), 5.09, 0.004, {"commonsense_accuracy": 56.5})
BETTER = Row("gptq", 4.89, -0.11, (-0.2, 0.02), 4.67, 0.004)
FAILED = Row("too-wide", error="SchemeError: group_size 4096")
HALF = replace(DPQ, variant="half", accuracy={}, error="accuracy.piqa: candidate not measured")
LADDER = [BASELINE, RTN, DPQ, BETTER, FAILED, HALF]

HOSTILE = [
    "<script>alert(1)</script>",
    "a|b",
    r"$\frac{$",
    "`*[x](y)*`",
    '"><img src=x>',
    "_a_ & b",
]


def page_of(rows, **options):
    page = html(rows, "a <b>title</b>", {"model": "<i>m</i>"}, **options)
    return page, document_fromstring(page, parser=HTMLParser(recover=False, huge_tree=True))


def svg_of(page):
    return page[page.index("<svg") : page.index("</svg>") + len("</svg>")]


def texts(svg):
    return [
        "".join(node.itertext()) for node in ElementTree.fromstring(svg).iter() if is_text(node)
    ]


def is_text(node):
    return node.tag.endswith("}text")


def parsed_markdown(text):
    """Lines of cells of the table, and the list's items, as a reader sees them."""
    table, items, kind = [], [], None
    for token in MarkdownIt().enable("table").parse(text):
        if token.type == "tr_open":
            table.append([])
        elif token.type in ("th_open", "td_open", "list_item_open"):
            kind = token.type
        elif token.type == "inline":
            shown = "".join(child.content for child in token.children)
            (items if kind == "list_item_open" else table[-1]).append(shown)
    return table, items


def test_every_row_has_a_cell_for_every_column():
    assert columns(LADDER) == [
        *("variant", "perplexity", "increase", "95 % interval", "bits/w", "layer error"),
        *("accuracy.piqa (acc)", "commonsense_accuracy"),
    ]
    assert [cells(row, LADDER) for row in (BASELINE, DPQ, BETTER, FAILED)] == [
        ["bf16", "5.0000", "+0.0000", "–", "16.00", "0.00000", "57.10", "–"],
        ["dpq-gar", "5.2500", "+0.2500", "+0.2000 … +0.3000", "5.09", "0.00400", "–", "56.50"],
        ["gptq", "4.8900", "-0.1100", "-0.2000 … +0.0200", "4.67", "0.00400", "–", "–"],
        ["too-wide", "failed", *["–"] * 6],
    ]


def test_distances_and_gates_are_columns_where_any_row_has_them():
    apart = replace(
        DPQ,
        distances={"divergence": 0.0312, "top1_agreement": 0.9512, "flips": 3.0},
        gates="not shown: perplexity_token",
    )
    rows = [BASELINE, apart]
    assert columns(rows)[6:10] == ["KL, nats", "top-1", "flips, %", "gates"]
    assert cells(apart, rows)[6:10] == [
        *("0.03120", "0.9512", "3.00"),
        "not shown: perplexity_token",
    ]
    assert cells(BASELINE, rows)[6:10] == ["–"] * 4
    assert as_records(rows)[1]["divergence"] == 0.0312
    assert as_records(rows)[0]["flips"] is None
    assert as_records(rows)[1]["gates"] == "not shown: perplexity_token"


def test_a_row_without_perplexity_says_why():
    with pytest.raises(ValueError, match="dpq: a row without perplexity"):
        Row("dpq")


def test_records_are_flat_with_the_same_keys_and_nothing_json_lacks():
    records = as_records([*LADDER, replace(RTN, increase=math.inf, interval=(math.nan, 1.0))])
    assert {tuple(record) for record in records} == {tuple(records[0])}
    assert records[2]["interval_low"] == 0.2
    assert records[2]["commonsense_accuracy"] == 56.5
    assert records[4] == {
        **dict.fromkeys(records[0]),
        "variant": "too-wide",
        "error": "SchemeError: group_size 4096",
    }
    assert (records[-1]["increase"], records[-1]["interval_low"]) == (None, None)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_shows_any_text_as_it_is(name):
    odd = replace(RTN, variant=name, error=f"{name}\nsecond line")
    table, items = parsed_markdown(markdown([*LADDER, odd]))
    assert table == [columns(LADDER), *(cells(row, LADDER) for row in [*LADDER, odd])]
    assert items[-1] == f"{name}: {name} second line"
    assert len(items) == 3


def test_markdown_without_failures_ends_with_the_table():
    assert markdown([BASELINE]).splitlines()[-1].startswith("| bf16 |")


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_shows_any_text_as_it_is(name):
    odd = replace(RTN, variant=name, error=name)
    page, tree = page_of([*LADDER, odd])
    assert not tree.xpath("//script | //img | //i | //b")
    assert tree.xpath("//tbody/tr[last()]/th")[0].text_content() == name
    assert tree.xpath("//li[last()]")[0].text_content() == f"{name}: {name}"
    assert name in texts(svg_of(page))


def test_the_page_has_the_table_and_the_reasons():
    _, tree = page_of(LADDER)
    rows = tree.xpath("//tbody/tr")
    assert [[cell.text_content() for cell in row] for row in rows] == [
        cells(row, LADDER) for row in LADDER
    ]
    assert [cell.text_content() for cell in tree.xpath("//thead//th[@scope='col']")] == columns(
        LADDER
    )
    assert len(tree.xpath("//tbody//th[@scope='row']")) == len(LADDER)
    assert tree.xpath("//table/caption")
    assert [item.text_content() for item in tree.xpath("//li")] == [
        "too-wide: SchemeError: group_size 4096",
        "half: accuracy.piqa: candidate not measured",
    ]


def test_the_plot_is_named_by_what_it_shows():
    _, tree = page_of(LADDER)
    (name,) = tree.xpath("//*[@role='img']/@aria-labelledby")
    said = " ".join(tree.get_element_by_id(name).text_content().split())
    assert "Lowest at 4.67 bits: gptq, -0.1100; 5.09 bits: dpq-gar, +0.2500." in said
    assert "1 of 6 rows" in said


def test_the_page_fetches_nothing_and_its_ids_are_unique():
    page, tree = page_of(LADDER, limit=0.05)
    links = tree.xpath("//@href | //@src | //@*[name()='xlink:href']")
    assert all(link.startswith("#") for link in links)
    assert not tree.xpath("//script | //link | //iframe")
    assert "url(http" not in page
    assert "@import" not in page
    ids = tree.xpath("//@id")
    assert len(ids) == len(set(ids))


def test_the_page_has_the_same_bytes_each_time():
    assert page_of(LADDER, limit=0.05)[0] == page_of(LADDER, limit=0.05)[0]


@pytest.mark.parametrize("rows", [[BASELINE], [BASELINE, FAILED]])
def test_no_plot_of_the_baseline_alone(rows):
    page, tree = page_of(rows)
    assert "<svg" not in page
    assert len(tree.xpath("//tbody/tr")) == len(rows)


@pytest.mark.parametrize("limit", [None, 0.05, 300.0])
@pytest.mark.parametrize(
    "increases",
    [
        pytest.param([0.0] * 30, id="all the same"),
        pytest.param([0.27 + 0.0001 * i for i in range(30)], id="almost the same"),
        pytest.param([-0.1 * i for i in range(30)], id="all below zero"),
        pytest.param([9e4, *[0.01 * i for i in range(29)]], id="one far above"),
        pytest.param([0.1 * i for i in range(30)], id="apart"),
    ],
)
def test_labels_and_markers_stand_apart_and_inside_the_plot(increases, limit):
    points = [(f"v-{i}", 5.0, increase) for i, increase in enumerate(increases)]
    figure = ladder_figure([*points, ("bf16", 16.0, 0.0)], limit)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    frame = axes.get_window_extent()
    names = {name for name, *_ in points}
    labels = [text for text in axes.texts if text.get_text() in names]
    boxes = sorted(Text.get_window_extent(label).intervaly.tolist() for label in labels)
    assert len(boxes) == len(points)
    assert all(frame.y0 <= low < high <= frame.y1 for low, high in boxes)
    assert all(below[1] < above[0] for below, above in pairwise(boxes))
    spots = [axes.transData.transform(line.get_xydata())[0] for line in markers(axes)]
    assert len(spots) == len(points) + 1
    assert min(math.dist(a, b) for i, a in enumerate(spots) for b in spots[:i]) > 5
    assert all(frame.contains(*spot) for spot in spots)


def markers(axes):
    return [line for line in axes.lines if line.get_marker() != "None"]


def test_a_long_name_is_cut_in_the_plot_and_whole_in_the_table():
    name = "x" * 200
    page, tree = page_of([*LADDER, replace(RTN, variant=name)])
    assert f"{'x' * 39}…" in texts(svg_of(page))
    assert tree.xpath("//tbody/tr[last()]/th")[0].text_content() == name

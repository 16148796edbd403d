"""The release report: one page that stands alone, for who has a minute to say whether to ship.

Pure: `ReportData` in, HTML out. Nothing is fetched and nothing runs: the page's own policy
(Content-Security-Policy) forbids both, and Jinja escapes all but the charts, which matplotlib
escapes. Each chart is drawn twice, for a wide window and for a phone, and stands beside a table of
what it shows. A number that there is none of is a word.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from dpq_core.benchmark.throughput import Times
from dpq_core.calibration.required_tokens import CalibrationTokens
from dpq_core.checkpoint.exports.card import shown_scheme
from dpq_core.data.texts import label_of
from dpq_core.evaluation.scores import PERPLEXITIES
from dpq_core.recipe import Recipe
from dpq_core.recipe.scheme import Scheme
from dpq_core.verdict.gates import THROUGHPUT_RATIO, Verdict
from flows.reporting.html import rendered
from flows.reporting.prefect_artifacts import (
    gate_rows,
    interval,
    model_notes,
    notes,
    number,
    turned,
)
from infra.registry.history import PastVersion
from tasks.benchmark import THROUGHPUT
from tasks.log import layer_rows
from tasks.support.figures import svg
from tasks.support.report_figures import (
    batches_figure,
    history_figure,
    layers_figure,
    throughput_figure,
    worst_layers,
)
from tasks.support.speeds import conditions, shown

_WIDTHS = {"wide": 720, "narrow": 336}  # pixels; the style sheet shows one of them
_WORST = 10
_ALIGNED = re.compile(r"[+−]?[\d.,]+( bytes| [kMGT]B)?|missing|–|not measured")
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")


@dataclass(frozen=True)
class ReportData:
    """What a report tells of a release. sizes: bytes of weights, 16-bit model and candidate.
    past: versions of the registered model with this one, the oldest first. parts: tables of suites'
    categories and subjects. checks: of integrity, None where passed."""

    made: datetime
    recipe: Recipe
    name: str
    version: int
    verdict: Verdict
    previous_champion: int | None
    manifest: Mapping[str, Any]
    checkpoint: str
    checkpoint_sha256: str
    run: str
    sizes: tuple[int, int]
    checks: Mapping[str, str | None]
    past: Sequence[PastVersion]
    exports: Sequence[Mapping[str, Any]] = ()
    rounds: Sequence[Mapping[str, Any]] = ()
    proxy_correlation: float | None = None
    parts: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    environment: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    speeds: Sequence[Times] = ()


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first of a row names it. cards: on a phone a card a row, where
    every column matters, and not a table that scrolls."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    cards: bool = False

    @property
    def numeric(self) -> list[bool]:
        """By column, whether it is aligned as numbers are."""
        cells = zip(*self.rows, strict=True) if self.rows else [()] * len(self.columns)
        return [all(_ALIGNED.fullmatch(cell) for cell in column) for column in cells]


@dataclass(frozen=True)
class Chart:
    """Drawings by width, and what they show in words."""

    drawings: Mapping[str, Markup]
    says: str


def page(data: ReportData) -> str:
    """The report as HTML."""
    return rendered(
        "report.html",
        data=data,
        made=f"{data.made:%Y-%m-%d %H:%M %Z}",
        base=data.manifest["base_model"]["id"],
        bits=number(8 * data.manifest["bytes_per_weight"], ".2f"),
        champion=_champion(data),
        gates=_gates(data),
        judged=_judged(data),
        suites=_suites(data),
        failures={n: m.wrong for n, m in data.verdict.metrics.items() if m.wrong},
        parts=[_parts(suite, rows) for suite, rows in data.parts.items()],
        layers=_layers_chart(data),
        worst=_worst(data),
        size=_size(data),
        exports=_exports(data),
        speeds=_table("Variants of the model by device and batch", shown(data.speeds)),
        speed_charts=_speed_charts(data),
        conditions=[f"{t.device}: {line}" for t in data.speeds for line in conditions(t)],
        history=_history_chart(data),
        versions=_versions(data),
        measured_throughput=any(THROUGHPUT in past.metrics for past in data.past),
        rounds=_rounds(data),
        correlation=None
        if data.proxy_correlation is None
        else number(data.proxy_correlation, ".3f"),
        facts=_facts(data),
        skipped=skipped(data),
    )


def skipped(data: ReportData) -> list[str]:
    """What was not quantized, measured, written or tried, and why: a line each."""
    recipe, metrics = data.recipe, data.verdict.metrics
    lines = [_sentence(line) for line in model_notes(data.manifest)]
    lines += [f"{name} failed: {m.wrong}" for name, m in metrics.items() if m.wrong]
    lines += notes(metrics)
    if recipe.evaluation.limit is not None:
        lines.append(
            f"Documents: the first {recipe.evaluation.limit} of each suite alone were scored"
        )
    if not recipe.evaluation.suites:
        lines.append("Accuracy: not measured, the recipe names no suite")
    perplexity = recipe.evaluation.perplexity
    if perplexity and perplexity.dataset == recipe.calibration.dataset:
        lines.append("Other text for calibration: none, it reads the text that perplexity judges")
    if perplexity is None:
        lines.append("Perplexity: not measured, the recipe names no data set")
    if not any(THROUGHPUT in v.metrics for v in data.past if v.number == data.version):
        lines.append("Throughput: not measured in this release")
    if not recipe.export:
        lines.append("Exports: none, the recipe asks for no other format")
    elif not data.exports:
        lines.append(f"Exports ({', '.join(recipe.export)}): not written, the gates came first")
    if data.verdict.verdict != "promoted" and not recipe.repair.enabled:
        lines.append("Repair: not tried, the recipe does not enable it")
    return lines


def _champion(data: ReportData) -> dict[str, Any]:
    """Who is champion now, and the command that changes it, if any does."""
    name, before = data.name, data.previous_champion
    command = f'dpq rollback {name} --why "…"'
    if data.verdict.verdict != "promoted":
        is_now = (
            f"There is no champion of {name}."
            if before is None
            else f"Version {before} is champion of {name}; this release did not change it."
        )
        return {"is": is_now, "command": None, "does": "There is nothing to roll back."}
    is_now = f"Version {data.version} is champion of {name} now."
    if before is None:
        return {
            "is": f"{is_now} There was none before.",
            "command": None,
            "does": "There is no earlier version to roll back to.",
        }
    return {
        "is": f"{is_now} Before it: version {before}.",
        "command": command,
        "does": f"This makes version {before} champion again, once its files are read and found"
        " whole.",
    }


def _gates(data: ReportData) -> Table:
    """What was judged, and what is missing although it was to be shown."""
    judged = {n: m for n, m in data.verdict.metrics.items() if m.limit is not None or m.wrong}
    keys = ("metric", "baseline", "candidate", "delta", "interval", "limit", "result")
    titles = ("metric", "baseline", "candidate", "delta", "interval of delta", "limit", "pass")
    return _table(
        "Candidate against 16-bit baseline",
        gate_rows(judged),
        dict(zip(keys, titles, strict=True)),
        cards=True,
    )


def _judged(data: ReportData) -> str:
    """How many gates passed, and what the limits are limits of."""
    gates = data.recipe.gates
    judged = [metric for metric in data.verdict.metrics.values() if metric.limit is not None]
    passed = sum(metric.passed for metric in judged)
    what = "the difference itself"
    if gates.confidence is not None:
        what = f"the worse end of the {gates.confidence:.0%} interval"
    unit = "absolute, of accuracies in points"
    if gates.mode == "relative":
        unit = "in percent of the baseline"
    said = (
        f"{passed} of {len(judged)} gates passed. Judged on {data.verdict.judged_on}, by {what};"
        f" limits are {unit}, and what reaches one fails."
    )
    if gates.throughput_ratio is not None:
        said += f" Of {THROUGHPUT_RATIO} what reaches its limit passes."
    return said


def _suites(data: ReportData) -> Table:
    """Every suite and data set by itself."""
    rows = []
    for name, metric in data.verdict.metrics.items():
        if not _is_one_suite(name):
            continue
        suite, spec = (
            name.removeprefix("accuracy."),
            ".4f" if metric.metric in PERPLEXITIES else ".2f",
        )
        few_shot = data.recipe.evaluation.num_fewshot.get(suite, 0)
        row = {
            "suite": suite,
            "baseline": number(metric.baseline, spec),
            "candidate": number(metric.candidate, spec),
            "delta": number(metric.delta, f"+{spec}"),
            "interval of delta": interval(metric, spec),
            "answers turned": turned(metric),
            "metric": metric.metric,
            "documents": f"{metric.documents:,}",
            "few-shot": str(few_shot),
        }
        rows.append(row)
    return _table("Each suite by itself, accuracies in percent", rows)


def _is_one_suite(name: str) -> bool:
    return name.startswith(("accuracy.", "perplexity_word"))


def _parts(suite: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = [
        {
            key: number(value, ".2f") if isinstance(value, float) else str(value)
            for key, value in (
                ("name", row["name"]),
                *((k, v) for k, v in row.items() if k != "name"),
            )
        }
        for row in rows
    ]
    return _table(f"Categories and subjects of {suite}, percent", shown)


def _layers_chart(data: ReportData) -> Chart:
    errors = _errors(data)
    ranked = worst_layers(errors, _WORST)
    finite = [error for error in errors.values() if math.isfinite(error)]
    says = (
        f"Relative output error of {len(errors)} layers, a column for each kind of layer and in it"
        f" the blocks in order; lines are medians. Numbered are the worst, {len(ranked)} of them,"
        " as in the table."
    )
    if finite:
        says += f" From {min(finite):.3g} to {max(finite):.3g}."
    if any(error == 0 for error in finite):
        says += f" Without error, on the axis: {finite.count(0)}."
    if len(finite) < len(errors):
        says += f" Not finite, at the top: {len(errors) - len(finite)}."
    return _chart("layers", says, lambda width: layers_figure(errors, ranked, width))


def _worst(data: ReportData) -> Table:
    layers = {row["layer"]: row for row in layer_rows(data.manifest)}
    rows = [
        {
            "rank": str(rank),
            "layer": name,
            "relative output error": number(layers[name]["error"], ".5f"),
            "bits a weight": number(layers[name]["bits per weight"], ".2f"),
            "shape": layers[name]["shape"],
            "damping": number(layers[name]["damping"], "g"),
            "calibration tokens": f"{layers[name]['tokens']:,}",
        }
        for rank, name in enumerate(worst_layers(_errors(data), _WORST), 1)
    ]
    return _table("The layers with the largest errors", rows)


def _errors(data: ReportData) -> dict[str, float]:
    return {row["name"]: row["error"] for row in data.manifest["layers"]}


def _size(data: ReportData) -> Table:
    before, after = data.sizes
    rows = [
        {"what": "16-bit model", "layers": "–", "bits a weight": "–", "size": _bytes(before)},
        *_scheme_rows(data.manifest),
        {
            "what": f"whole checkpoint, {before / after:.2f} times smaller",
            "layers": "–",
            "bits a weight": "–",
            "size": _bytes(after),
        },
    ]
    return _table("Files of weights, and the layers in them by scheme", rows)


def _scheme_rows(manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """The quantized layers, grouped by scheme."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in manifest["layers"]:
        scheme = Scheme.model_validate({**manifest["scheme"], **row["scheme"]})
        groups.setdefault(shown_scheme(scheme), []).append(row)
    shown = []
    for name, rows in groups.items():
        taken = sum(row["bytes"] for row in rows)
        weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
        shown.append(
            {
                "what": name,
                "layers": str(len(rows)),
                "bits a weight": number(8 * taken / weights, ".2f"),
                "size": _bytes(taken),
            }
        )
    return shown


def _exports(data: ReportData) -> Table:
    rows = [
        {
            "format": row["format"],
            "bits a weight": number(row["bits per weight"], ".2f"),
            "size": _bytes(row["bytes"]),
            "verification": row["verification"],
            "SHA-256 of its manifest": row["sha256"][:16],
        }
        for row in data.exports
    ]
    return _table("Exports", rows)


def _speed_charts(data: ReportData) -> list[Chart]:
    """One a device that was there."""

    def chart(times: Times) -> Chart:
        rates = {f"{c.variant} at {c.batch}": c.decode_tokens_per_second for c in times.cells}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        says = f"Decoding on {times.device}, tokens a second against sequences at a time."
        if known:
            best = max(known, key=lambda name: known[name])
            says += f" Most: {known[best]:,.0f}, {best}."
        return _chart(f"speeds-{times.device}", says, lambda width: batches_figure(times, width))

    return [chart(times) for times in data.speeds if times.cells]


def _versions(data: ReportData) -> Table:
    speeds = any(THROUGHPUT in past.metrics for past in data.past)
    judged = _judged_names(data)
    champion = data.version if data.verdict.verdict == "promoted" else data.previous_champion
    rows = []
    for past in reversed(data.past):
        also = [
            word
            for word, holds in (
                ("this one", past.number == data.version),
                ("champion", past.number == champion),
                ("rolled back", past.rolled_back),
            )
            if holds
        ]
        row = {
            "version": f"{past.number} ({', '.join(also)})" if also else str(past.number),
            "registered": f"{past.created:%Y-%m-%d}",
            "verdict": past.verdict,
            "bits a weight": _bits(past.metrics.get("bytes_per_weight")),
        }
        if speeds:
            row["tokens per second"] = _measured(past, THROUGHPUT, ",.0f")
        for side, spec in (("delta", "+.4f"), ("baseline", ".4f")):
            row |= {f"{n}, {side}": _measured(past, f"{n}.{side}", spec) for n in judged}
        rows.append(row)
    return _table("Versions, the newest first", rows)


def _history_chart(data: ReportData) -> Chart | None:
    """Accuracy against throughput where any version has one; else the first gate's number over the
    versions; None where there are fewer than two points."""
    return _throughput_chart(data) or _number_chart(data)


def _throughput_chart(data: ReportData) -> Chart | None:
    judged = _judged_names(data)
    accuracies = [name for name in judged if not name.startswith("perplexity")]
    name = (accuracies or judged or [""])[0]
    key = f"{name}.{'candidate' if accuracies else 'delta'}"
    points = [
        (past.number, past.metrics[THROUGHPUT], past.metrics[key], past.verdict)
        for past in data.past
        if {THROUGHPUT, key} <= past.metrics.keys()
    ]
    if len(points) < 2:
        return None
    title = name if accuracies else f"{name}, candidate minus baseline"
    says = f"{title} against tokens per second of the {len(points)} versions that have both."
    return _chart(
        "history", says, lambda width: throughput_figure(points, data.version, title, width)
    )


def _number_chart(data: ReportData) -> Chart | None:
    judged = _judged_names(data)
    if not judged:
        return None
    name = judged[0]
    points = [
        (past.number, past.metrics[f"{name}.delta"], past.verdict)
        for past in data.past
        if f"{name}.delta" in past.metrics
    ]
    if len(points) < 2:
        return None
    metric, gates = data.verdict.metrics[name], data.recipe.gates
    limit = None
    if metric.limit is not None and gates.mode == "absolute":
        limit = metric.limit if name.startswith("perplexity") else -metric.limit
    says = (
        f"{name}, candidate minus baseline, over the last {len(points)} versions that have it:"
        f" from {min(p[1] for p in points):+.4f} to {max(p[1] for p in points):+.4f}."
    )
    title = f"{name}, candidate minus baseline"
    return _chart(
        "history", says, lambda width: history_figure(points, data.version, title, limit, width)
    )


def _judged_names(data: ReportData) -> list[str]:
    """Of quality; speed has a column of its own."""
    return [
        name
        for name, metric in data.verdict.metrics.items()
        if metric.limit is not None and not name.startswith(THROUGHPUT_RATIO)
    ]


def _rounds(data: ReportData) -> Table:
    rows = [
        {
            key: number(value, ".4f") if isinstance(value, float) else str(_or_dash(value))
            for key, value in row.items()
        }
        for row in data.rounds
    ]
    return _table("What each round of repair bought", rows)


def _facts(data: ReportData) -> dict[str, dict[str, str]]:
    """What the release was made of and with, by heading."""
    base, recipe = data.manifest["base_model"], data.recipe
    calibration = recipe.calibration
    return {
        "Model and checkpoint": {
            "base model": base["id"],
            "revision": base["revision"] or "a folder, no revision",
            "content of the base model, digest": base["digest"],
            "scheme": shown_scheme(recipe.scheme),
            "recipe, digest": recipe.digest,
            "checkpoint": data.checkpoint,
            "checkpoint's manifest, SHA-256": data.checkpoint_sha256,
            "MLflow run": data.run,
        },
        "Calibration": {
            "fingerprint, SHA-256 of its tokens": data.manifest["calibration"]["windows"],
            "data": f"{label_of(calibration.dataset)}, split {calibration.dataset.split}",
            "windows": f"at most {calibration.samples} of {calibration.sequence_length} tokens",
            "tokens": CalibrationTokens.of_manifest(data.manifest).line,
            "begin-of-text token before each": _bos(calibration.bos, data.manifest),
            "propagation": calibration.propagation,
            **_correction(calibration.correction),
            "statistics of inputs in": calibration.hessian_inputs,
            "tokens' weights in them": calibration.token_weights,
            "share of each window's first token": f"{calibration.first_token_share:g}",
        },
        **{heading: dict(facts) for heading, facts in data.environment.items()},
    }


def _correction(share: float) -> dict[str, str]:
    name = "correction towards the 16-bit model's outputs"
    return {name: f"{share:g} of it; errors are against the corrected weights"} if share else {}


def _bos(asked: str, manifest: Mapping[str, Any]) -> str:
    opening = manifest["calibration"].get("opening")
    return f"{'none' if opening is None else f'token {opening}'} ({asked})"


def _table(
    caption: str,
    rows: Sequence[Mapping[str, str]],
    titles: Mapping[str, str] | None = None,
    cards: bool = False,
) -> Table:
    """Records as a table; `titles` chooses and names columns, else those of the first row."""
    known = titles or {key: key for key in (rows[0] if rows else {})}
    keys = [key for key in known if not rows or key in rows[0]]
    cells = [[row[keys[0]], *(_shown(row[key]) for key in keys[1:])] for row in rows]
    return Table(caption, [known[key] for key in keys], cells, cards)


def _chart(name: str, says: str, draw: Any) -> Chart:
    def drawing(size: str, width: int) -> Markup:
        figure: Figure = draw(width)
        return Markup(svg(figure, f"{name}-{size}"))

    return Chart({size: drawing(size, width) for size, width in _WIDTHS.items()}, says)


def _shown(cell: str) -> str:
    """With a minus that a screen reader reads, and an interval in words."""
    return _MINUS.sub("−", cell).replace(" … ", " to ")


def _measured(past: PastVersion, key: str, spec: str) -> str:
    return number(past.metrics[key], spec) if key in past.metrics else "not measured"


def _bits(bytes_per_weight: float | None) -> str:
    return "–" if bytes_per_weight is None else number(8 * bytes_per_weight, ".2f")


def _or_dash(value: object) -> object:
    return "–" if value is None else value


def _sentence(line: str) -> str:
    return line[:1].upper() + line[1:]


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000
    return f"{count:.3g} TB"

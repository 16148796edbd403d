"""What a benchmark found, as rows: for MLflow and Prefect as they are, for people as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpq_core.benchmark.throughput import BASELINE, Cell, Times
from tasks.support.markdown import markdown_table

NOT_HERE = "not measured here"


def as_records(devices: Sequence[Times]) -> list[dict[str, Any]]:
    """A row a device, variant and batch, all with the same keys; None where there is no number, and
    `wrong` says why. A device that is not here is one row."""
    return [
        {
            "device": times.device,
            "variant": cell.variant,
            "batch": cell.batch,
            "decode_tokens_per_second": cell.decode_tokens_per_second,
            "ratio_to_bf16": _ratio(cell, times),
            "roofline_tokens_per_second": cell.limit,
            "step_seconds": cell.step_seconds,
            "prefill_tokens_per_second": cell.prefill_tokens_per_second,
            "first_token_seconds": cell.first_token_seconds,
            "memory_bytes": cell.memory_bytes,
            "wrong": cell.wrong or times.wrong or None,
        }
        for times in devices
        for cell in times.cells or (_NOTHING,)
    ]


_NOTHING = Cell("–", 0)

# Key → title, factor, format.
_COLUMNS: dict[str, tuple[str, float, str]] = {
    "decode_tokens_per_second": ("decode, tokens/s", 1, ",.1f"),
    "ratio_to_bf16": ("× BF16", 1, ".2f"),
    "roofline_tokens_per_second": ("roofline, tokens/s", 1, ",.1f"),
    "step_seconds": ("step, ms", 1e3, ",.2f"),
    "prefill_tokens_per_second": ("prefill, tokens/s", 1, ",.0f"),
    "first_token_seconds": ("first token, ms", 1e3, ",.1f"),
    "memory_bytes": ("memory, GB", 1e-9, ",.2f"),
}


def shown(devices: Sequence[Times]) -> list[dict[str, str]]:
    """The same for people; why a number is missing stands in its place."""
    rows = []
    for record in as_records(devices):
        row = {key: str(record[key] or "–") for key in ("device", "variant", "batch")}
        for key, (title, factor, spec) in _COLUMNS.items():
            value = record[key]
            row[title] = "–" if value is None else format(value * factor, spec)
        if record["wrong"]:
            row[_COLUMNS["decode_tokens_per_second"][0]] = record["wrong"]
        rows.append(row)
    return rows


def conditions(times: Times) -> list[str]:
    """What a reader of a device's numbers has to know."""
    if times.bandwidth is None or times.product_rate is None:
        return [times.wrong]
    rates = (
        f"copy {times.bandwidth / 1e9:,.1f} GB/s (read and written), BF16 product"
        f" {times.product_rate / 1e12:,.3g} TFLOP/s, measured in the same run"
    )
    return [times.hardware, rates, *times.notes]


def markdown(title: str, devices: Sequence[Times]) -> str:
    """A section for a log: a GitHub-flavoured table, and the conditions of each device."""
    rows = shown(devices)
    table = markdown_table(list(rows[0]), [list(row.values()) for row in rows], names=2)
    about = [f"- {each.device}: {line}." for each in devices for line in conditions(each)]
    return "\n".join([f"## {title}", "", table, "", *about]) + "\n"


def metrics(devices: Sequence[Times]) -> Mapping[str, float]:
    """All numbers, by `benchmark.<device>.<variant>.<batch>.<what>`."""
    about = ("device", "variant", "batch")
    return {
        ".".join(["benchmark", *(str(record[key]) for key in about), key]): value
        for record in as_records(devices)
        for key, value in record.items()
        if key not in about and isinstance(value, int | float)
    }


def _ratio(cell: Cell, times: Times) -> float | None:
    """Decoding speed over the 16-bit model's at the same batch."""
    for other in times.cells:
        if (other.variant, other.batch) == (BASELINE, cell.batch):
            mine, base = cell.decode_tokens_per_second, other.decode_tokens_per_second
            return None if mine is None or base is None else mine / base
    return None

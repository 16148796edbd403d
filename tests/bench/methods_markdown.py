"""Tables of what `methods_table.py` measured, as Markdown for docs/results.md.

    python tests/bench/methods_markdown.py ROWS.jsonl ...

A file a model. Windows with even numbers choose, those with odd ones report: increases, divergences
and intervals (95 %, bootstrap over windows, the same ones for both models) are of odd windows, the
column `chosen by` is the divergence on even ones. The 16-bit perplexity of all windows stands above
the table. Accuracies are in percent of the first documents, their number beside it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000
FIRST = "16 bits"
EIGHT = (
    "hellaswag", "lambada_openai", "boolq", "arc_easy", "piqa", "winogrande", "arc_challenge",
    "openbookqa",
)  # fmt: skip
TITLES = (
    "row", "bits", "increase, 2,048", "95 %", "512", "KL, 2,048", "95 %", "agreement", "chosen by",
    "layer error", "eight suites", "MMLU", "documents", "s",
)  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Of one model, by part."""
    base = rows[FIRST]
    settings = base["settings"]
    perplexities = ", ".join(f"{length}: {_perplexity(base, length):.3f}" for length in LENGTHS)
    head = f"**{settings['model']}**, {settings['card']}, 16 bits {perplexities}"
    lines = [f"{head}; calibration {settings['samples']} × {settings['length']}.", ""]
    for part in dict.fromkeys(each["part"] for each in rows.values()):
        lines += [f"| {' | '.join(TITLES)} |", f"|---|{'--:|' * (len(TITLES) - 1)}"]
        own = [each for each in rows.values() if each["part"] == part]
        lines += [f"| {' | '.join(cells(each, base))} |" for each in own]
        lines.append("")
    return "\n".join(lines)


LENGTHS = "2048", "512"
ODD, EVEN = slice(1, None, 2), slice(0, None, 2)


def cells(each: dict[str, Any], base: dict[str, Any]) -> list[str]:
    shares = {name: 100 * _mean(answers) for name, answers in each.get("answers", {}).items()}
    eight = [shares[name] for name in EIGHT if name in shares]
    kl = np.array(each["2048"]["divergence"])
    errors = each["errors"]
    return [
        each["row"],
        f"{each['bits']:.2f}",
        f"{_increase(each, base, '2048'):+.3f}",
        _between(_increases(each, base, "2048"), "+.3f"),
        f"{_increase(each, base, '512'):+.3f}",
        f"{kl[ODD].mean():.4f}",
        _between(kl[ODD][_draws(len(kl[ODD]))].mean(1), ".4f"),
        f"{100 * np.mean(each['2048']['agreement'][ODD]):.2f}",
        f"{kl[EVEN].mean():.4f}",
        f"{errors['held_out']:.5f}" if errors else "–",
        f"{np.mean(eight):.2f}" if eight else "–",
        f"{shares['mmlu']:.2f}" if "mmlu" in shares else "–",
        f"{sum(map(len, each['answers'].values())):,}" if eight else "–",
        f"{each['seconds']['statistics'] + each['seconds']['layers']:.0f}",
    ]


def _perplexity(each: dict[str, Any], length: str) -> float:
    return float(np.exp(np.mean(each[length]["nats"])))


def _increase(each: dict[str, Any], base: dict[str, Any], length: str) -> float:
    own, first = (np.exp(np.mean(row[length]["nats"][ODD])) for row in (each, base))
    return float(own - first)


def _increases(each: dict[str, Any], base: dict[str, Any], length: str) -> Any:
    """Of resampled odd windows, the same ones for both."""
    own, first = (np.array(row[length]["nats"])[ODD] for row in (each, base))
    drawn = _draws(len(own))
    return np.exp(own[drawn].mean(1)) - np.exp(first[drawn].mean(1))


def _draws(count: int) -> Any:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _between(values: Any, spec: str) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{low:{spec}} … {high:{spec}}"


def _mean(answers: str) -> float:
    return sum(map(int, answers)) / len(answers)


def main() -> None:
    for file in map(Path, sys.argv[1:]):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        print(table({line["row"]: line for line in lines if "error" not in line}))
        for line in lines:
            if "error" in line:
                print(f"- {line['row']}: {line['error']}")


if __name__ == "__main__":
    main()

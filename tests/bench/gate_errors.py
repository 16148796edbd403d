"""How often the accuracy gate lets a candidate pass, by its true loss: docs/verdict.md.

    python tests/bench/gate_errors.py [--turned 4 8] [--trials 40000]

A document's answer turns wrong with probability (t + d/100)/2 and right with (t − d/100)/2, for a
share t of turned answers and a true drop of d points: multinomial draws, suites apart, the mean
over suites judged against 0.5 points. Candidates of one release are drawn anew at each look, which
is the worst case: the less they have in common, the more a further look is a further chance.

    one look     all documents, once: a release without repair
    four looks   all documents judge each of four candidates, and the first that passes is promoted
    halves       repair as it is: one half chooses among four candidates, the other judges one
    shown        one look, at the worse end of the 95 % interval (gates.confidence: 0.95)
"""

import argparse
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LIMIT, LOOKS, QUANTILE = 0.5, 4, 1.959964
DROPS = (0.0, 0.3, 0.6, 1.0, 2.0)
SUITES = {
    "quickstart, python_docs": (2312,),
    "MMLU": (14042,),
    "eight common-sense suites": (10042, 5153, 3270, 2376, 1838, 1267, 1172, 500),
}
SEED = 0


def losses(
    sizes: Sequence[int], turned: float, drop: float, rng: np.random.Generator, trials: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Measured loss of each trial in points, and its standard error as the pairs show it."""
    loss, variance = np.zeros(trials), np.zeros(trials)
    shares = [(turned + drop / 100) / 2, (turned - drop / 100) / 2, 1 - turned]
    for size in sizes:
        wrong, right, _ = rng.multinomial(size, shares, size=trials).T
        loss += 100 * (wrong - right) / size / len(sizes)
        mean = (wrong - right) / size
        variance += ((wrong + right) / size - mean**2) / size * (100 / len(sizes)) ** 2
    return loss, np.sqrt(variance)


def passed(
    sizes: Sequence[int], turned: float, drop: float, rng: np.random.Generator, trials: int
) -> dict[str, float]:
    """Share of releases that the gate lets pass, by how it looks."""
    looks = [losses(sizes, turned, drop, rng, trials) for _ in range(LOOKS)]
    first, error = looks[0]
    half = [size // 2 for size in sizes]
    judged, _ = losses(half, turned, drop, rng, trials)
    return {
        "one look": np.mean(first < LIMIT),
        "four looks": np.mean(np.any([loss < LIMIT for loss, _ in looks], axis=0)),
        "halves": np.mean(judged < LIMIT),
        "shown": np.mean(first + QUANTILE * error < LIMIT),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turned", type=float, nargs="+", default=[4, 8], help="percent")
    parser.add_argument("--trials", type=int, default=40_000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(SEED)
    print("| documents | turned | true drop | one look | four looks | halves | shown |")
    print("|---|---|---|---|---|---|---|")
    for name, sizes in SUITES.items():
        for turned in arguments.turned:
            for drop in DROPS:
                found = passed(sizes, turned / 100, drop, rng, arguments.trials)
                cells = " | ".join(f"{100 * share:.0f} %" for share in found.values())
                print(f"| {sum(sizes):,} ({name}) | {turned:g} % | {drop:.1f} | {cells} |")


if __name__ == "__main__":
    main()

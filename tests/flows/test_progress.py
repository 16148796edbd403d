"""Lines and bars of a run's stages, and what is said before it starts."""

import gzip
import io
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from dpq_core.recipe import TextDataset, load_recipe, parse_recipe
from flows.cli import forecast as module
from flows.cli import progress
from flows.cli.forecast import forecast
from flows.cli.progress import Pace, _Bars, _Lines
from tasks.support.progress import parts_of_step, reporting_to, stepper


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def run_through(report, clock, stage, seconds):
    """A stage whose steps take these seconds."""
    report(stage, 0, len(seconds))
    for done, taken in enumerate(seconds, start=1):
        clock.now += taken
        report(stage, done, len(seconds))


def lines_of(run):
    told = io.StringIO()
    run(_Lines(Console(file=told, width=40)))
    return told.getvalue().splitlines()


def test_the_time_left_is_that_of_the_steps_to_come_and_shrinks_between_them():
    pace = Pace(10, 100.0)
    assert pace.left(100.0) is None
    pace.advance(1, 160.0)  # compiles for a minute: says nothing of the steps to come
    assert pace.left(160.0) is None
    pace.advance(2, 164.0)
    assert pace.left(164.0) == 32
    assert pace.left(166.5) == 29.5
    assert pace.left(1000.0) == 0
    pace.advance(10, 196.0)
    assert pace.ended
    assert pace.left(196.0) is None


def test_the_time_left_does_not_jump():
    """Steps of 4 to 6 seconds: from a moment to the next it changes by less than two steps."""
    draw, pace, now, shown = random.Random(0), Pace(200, 0.0), 0.0, []
    for done in range(1, 200):
        for _ in range(draw.choice([4, 5, 6])):
            now += 1
            shown.append(pace.left(now))
        pace.advance(done, now)
    known = [left for left in shown if left is not None]
    assert len(known) > 800
    assert all(abs(after - before) < 30 for before, after in pairwise(known))
    assert known[-1] < 15


def test_a_log_gets_a_line_at_the_start_and_at_the_end_of_a_stage(clock):
    def run(lines):
        run_through(lines.report, clock, "calibrate", [5.0] * 5)
        run_through(lines.report, clock, "quantize", [0.1] * 35)

    told = lines_of(run)
    assert told == ["calibrate …", "calibrate: done in 25 s", "quantize …", "quantize: done in 4 s"]


def test_a_long_stage_tells_each_tenth_in_numbers_that_rise(clock):
    told = lines_of(lambda lines: run_through(lines.report, clock, "perplexity", [7.2] * 1000))
    tenths = [f"perplexity: {10 * i} % in" for i in range(1, 10)]
    assert [line.partition(" in ")[0] + " in" for line in told[1:-1]] == tenths
    assert told[1].endswith(" 12 min")
    assert told[-2].endswith(" 1 h 48 min")
    assert told[-1] == "perplexity: done in 2 h 0 min"


def test_lines_of_a_stage_are_a_minute_apart(clock):
    told = lines_of(lambda lines: run_through(lines.report, clock, "assemble", [1.0] * 100))
    assert told == ["assemble …", "assemble: 60 % in 60 s", "assemble: done in 2 min"]


def test_a_stage_that_begins_again_is_told_again_and_one_without_steps_not_at_all(clock):
    def run(lines):
        for _ in range(2):
            run_through(lines.report, clock, "calibrate", [1.0, 1.0])
        lines.report("calibrate", 2, 2)  # once more the end
        run_through(lines.report, clock, "export", [])

    assert lines_of(run) == 2 * ["calibrate …", "calibrate: done in 2 s"]


def test_parts_of_a_step_move_its_stage():
    seen = []
    with reporting_to(lambda *told: seen.append(told)):
        block = stepper("calibrate", 2)
        for number in range(2):
            batch = parts_of_step("calibrate", number, 2)
            batch()
            batch()
            block()
    assert seen == [
        ("calibrate", 0, 2),
        *[("calibrate", done, None) for done in (0.5, 1.0)],
        ("calibrate", 1, 2),
        *[("calibrate", done, None) for done in (1.5, 2.0)],
        ("calibrate", 2, 2),
    ]


def test_a_terminal_shows_one_bar_a_stage_with_the_time_left(clock):
    shown = io.StringIO()
    bars = _Bars(Console(file=shown, force_terminal=True, width=100, legacy_windows=False))
    with bars:
        for stage in ("calibrate", "quantize"):
            bars.report(stage, 0, 4)
            for done in (1, 2, 3):
                clock.now += 10
                bars.report(stage, done, 4)
        clock.now += 4
        bars._bars.refresh()
        bars.report("calibrate", 4, 4)
    text = shown.getvalue()
    assert "quantize" in text
    assert "3/4" in text
    assert "6 s left" in text
    assert len(bars._bars.tasks) == 2


RECIPE = Path(__file__).parents[2] / "recipes/quickstart.yaml"


def rated(factor):
    """The forecast on a machine that is so many times as fast as a slow one."""
    return lambda shapes, device: module._Rates(1e10 * factor, 1e10 * factor, 1e8 * factor)


def test_a_forecast_names_every_stage_and_adds_their_times(monkeypatch):
    monkeypatch.setattr(module, "_rates", rated(1))
    monkeypatch.setattr(module.os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    told = forecast(load_recipe(RECIPE))
    assert "3.5 million weights; products here: 10 GFLOP/s" in told[0]
    names = ["baseline", "calibrate", "quantize", "candidate", "verdict"]
    assert [line.split()[0] for line in told[1:6]] == names
    assert "128 windows of 512 tokens, twice" in told[2]
    assert "35 layers, dpq, 4 bits" in told[3]
    assert "perplexity rises by less than 0.05; accuracy falls by less than 0.5 points" in told[5]
    assert told[1].rpartition(": ")[2] == told[4].rpartition(": ")[2]
    assert told[7].startswith("this machine is busy (load 9.0")
    slow = seconds_in(told[6])
    assert slow == pytest.approx(sum(map(seconds_in, told[1:5])), rel=0.1)
    monkeypatch.setattr(module, "_rates", rated(10))
    monkeypatch.setattr(module.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    quick = forecast(load_recipe(RECIPE))
    assert len(quick) == 7
    assert seconds_in(quick[6]) == pytest.approx(slow / 10, rel=0.1)


def seconds_in(line):
    """Of `about 2 h 10 min`."""
    (said,) = re.findall(r"about ((?:\d+ (?:s|min|h) ?)+)", line)
    units = {"s": 1, "min": 60, "h": 3600}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+) (s|min|h)", said))


def test_a_forecast_of_groups_and_of_two_models(monkeypatch):
    """Passes as far as each input, and through the block: longer than two through it."""
    monkeypatch.setattr(module, "_rates", rated(1))
    groups = ["calibration.propagation=groups"]
    settings = [[], groups, [*groups, "calibration.correction=0.5"]]
    told = [forecast(load_recipe(RECIPE, each), measured=False)[1] for each in settings]
    assert ["group by group" in line for line in told] == [False, True, True]
    one, two, three = map(seconds_in, told)
    assert one < two < three < 3 * one


def test_a_forecast_of_quantize_has_no_measurements(monkeypatch):
    monkeypatch.setattr(module, "_rates", rated(1))
    told = forecast(load_recipe(RECIPE), measured=False)
    assert [line.split()[0] for line in told[1:3]] == ["calibrate", "quantize"]
    assert not any("baseline" in line for line in told)


def test_what_cannot_be_known_yet_is_said():
    content = {
        "model": {"id": "somebody/model-8b"},
        "calibration": {"dataset": {"path": "python_docs"}},
        "evaluation": {"suites": ["hellaswag", "of_mine"]},
    }
    told = forecast(parse_recipe(content))
    assert told[0].startswith("somebody/model-8b: its size is not known yet")
    assert [line for line in told if line.startswith("how long: known when the model is here")]
    content["model"]["id"] = load_recipe(RECIPE).model.id
    told = forecast(parse_recipe(content))
    assert "and those of of_mine, which are not counted here" in told[1]


def test_texts_in_files_count_by_their_unpacked_size(tmp_path):
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_bytes(b"x" * 1000)
    packed.write_bytes(gzip.compress(b"x" * 5000))
    dataset = TextDataset(path="json", data_files=[str(plain), str(packed)])
    assert module._characters(dataset) == 6000
    assert module._characters(TextDataset(path="json", data_files="s3://bucket/a.jsonl")) is None


def test_a_forecast_leaves_what_is_wrong_with_files_to_preflight(tmp_path):
    empty = tmp_path / "empty.jsonl.gz"
    empty.touch()
    for name in (str(empty), f"{'x' * 300}.jsonl"):
        module._characters(TextDataset(path="json", data_files=name))
    assert module._characters(TextDataset(path="json", data_files=str(empty))) == 0

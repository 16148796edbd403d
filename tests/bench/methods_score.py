"""Scores of a model on one device: perplexity, divergence from the 16-bit model, suites.

Perplexity as `dpq_core.evaluation.perplexity` has it; divergence is KL(p16 || p) a token and the
share of tokens whose most likely successor is the same. Suites are arrays that `methods_suites.py`
made of lm-evaluation-harness's requests, which no longer need the harness.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Reference:
    """The 16-bit model's last hidden states of windows, [windows, length, width], and its head."""

    states: Tensor
    head: Tensor  # [vocabulary, width]


@dataclass(frozen=True)
class WindowScores:
    """Means over a window's predicted tokens, a number a window."""

    nats: list[float]
    divergence: list[float]
    agreement: list[float]

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.mean(self.nats)))


def states_of(model: Any, rows: Tensor) -> Tensor:
    """Last hidden states [windows, length, width], after the norm."""
    states: Tensor = model.model(
        input_ids=rows.to(model.lm_head.weight.device), use_cache=False
    ).last_hidden_state
    return states


@torch.inference_mode()
def reference(model: Any, windows: Tensor, batch: int) -> Reference:
    states = torch.cat([states_of(model, part) for part in windows.split(batch)])
    return Reference(states, model.lm_head.weight.detach().clone())


@torch.inference_mode()
def score_windows(
    model: Any, windows: Tensor, old: Reference, first: int, batch: int
) -> WindowScores:
    """first: of the tokens that are predicted, two where BOS leads."""
    columns: list[Tensor] = []
    for start in range(0, len(windows), batch):
        rows = windows[start : start + batch].to(old.head.device)
        kept = slice(first - 1, -1)
        states = states_of(model, rows)[:, kept]
        before, targets = old.states[start : start + batch, kept], rows[:, first:]
        flat = states.flatten(0, 1), before.flatten(0, 1), targets.flatten()
        found = _compared(*flat, model.lm_head.weight, old.head)  # [3, tokens]
        columns.append(found.view(3, *targets.shape).double().mean(2))
    return WindowScores(*torch.cat(columns, 1).cpu().tolist())


def _compared(
    states: Tensor, before: Tensor, targets: Tensor, head: Tensor, old_head: Tensor
) -> Tensor:
    """Nats, divergence and agreement of each token, [3, tokens] fp32."""
    size = max(1, (1 << (27 if states.is_cuda else 26)) // len(head))
    parts = []
    for at in range(0, len(targets), size):
        part = slice(at, at + size)
        new, old = logits(states[part], head), logits(before[part], old_head)
        agreement = (new.argmax(1) == old.argmax(1)).float()
        new = functional.log_softmax(new, 1)
        nats = -new.gather(1, targets[part, None])[:, 0]
        old = functional.log_softmax(old, 1)
        divergence = new.neg_().add_(old).mul_(old.exp_()).sum(1)
        parts.append(torch.stack([nats, divergence, agreement]))
    return torch.cat(parts, 1)


def logits(states: Tensor, head: Tensor) -> Tensor:
    """states [n, width], head [vocabulary, width] → [n, vocabulary] fp32, sums in FP32."""
    if states.is_cuda and states.dtype == torch.bfloat16:
        return torch.mm(states, head.T, out_dtype=torch.float32)
    return states.float() @ head.float().T


@dataclass(frozen=True)
class Suites:
    """Requests of all suites. Sequences are what the model reads; a request is a continuation whose
    tokens are predicted at the last places of its sequence; a document is one question.

    tokens: of all sequences; ends [sequences]. sequence, goal_ends, norms [requests]: whose
    sequence, where its tokens end in `goals`, characters of the answer. last, right, suite, place
    [documents]: its last request + 1, the right choice (-1: right where its tokens are the
    likeliest), the suite, its number in its task. normed [suites]: whether log-likelihoods are
    divided by `norms`.
    """

    names: list[str]
    tokens: np.ndarray
    ends: np.ndarray
    sequence: np.ndarray
    goals: np.ndarray
    goal_ends: np.ndarray
    norms: np.ndarray
    last: np.ndarray
    right: np.ndarray
    suite: np.ndarray
    place: np.ndarray
    normed: np.ndarray

    @classmethod
    def load(cls, file: Any) -> "Suites":
        stored = np.load(file)
        columns = [key for key in stored.files if key != "names"]
        rest = {key: stored[key].astype(np.int64) for key in columns}
        return cls([str(name) for name in stored["names"]], **rest)

    def read(self, sequence: int) -> Tensor:
        return torch.from_numpy(self.tokens[_span(self.ends, sequence)])

    def asked(self, request: int) -> Tensor:
        return torch.from_numpy(self.goals[_span(self.goal_ends, request)])


def _span(ends: np.ndarray, number: int) -> slice:
    return slice(int(ends[number - 1]) if number else 0, int(ends[number]))


@torch.inference_mode()
def score_suites(
    model: Any, suites: Suites, limits: Mapping[str, int], tokens_a_batch: int
) -> dict[str, list[int]]:
    """Right or wrong, of the first documents of each of a suite's tasks, by suite."""
    most = np.array([limits[name] for name in suites.names])
    chosen = np.flatnonzero(suites.place < most[suites.suite])
    spans = [_span(suites.last, number) for number in chosen]
    wanted = [request for span in spans for request in range(span.start, span.stop)]
    sums, greedy = _log_likelihoods(model, suites, wanted, tokens_a_batch)
    found: dict[str, list[int]] = {name: [] for name in suites.names}
    for number, span in zip(chosen, spans, strict=True):
        suite, right, own = suites.suite[number], suites.right[number], sums[span]
        if right < 0:
            answer = bool(greedy[span].all())
        else:
            own = own / suites.norms[span] if suites.normed[suite] else own
            answer = bool(np.isfinite(own).all()) and int(own.argmax()) == right
        found[suites.names[suite]].append(int(answer))
    return found


def _log_likelihoods(
    model: Any, suites: Suites, requests: list[int], tokens_a_batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of every request, NaN where it is not among `requests`; and whether its tokens are the
    likeliest ones."""
    sums = np.full(len(suites.sequence), np.nan)
    greedy = np.zeros(len(suites.sequence), bool)
    of_sequence: dict[int, list[int]] = {}
    for request in requests:
        of_sequence.setdefault(int(suites.sequence[request]), []).append(request)
    lengths = {number: len(suites.read(number)) for number in of_sequence}
    for batch in _batches(lengths, tokens_a_batch):
        inputs = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.int64)
        asked, lines, places, goals = [], [], [], []
        for line, sequence in enumerate(batch):
            inputs[line, : lengths[sequence]] = suites.read(sequence)
            for request in of_sequence[sequence]:
                own = suites.asked(request)
                asked.append(request)
                goals.append(own)
                lines.append(torch.full_like(own, line))
                places.append(torch.arange(-len(own), 0) + lengths[sequence])
        states = states_of(model, inputs)
        lines, places = (torch.cat(each).to(states.device) for each in (lines, places))
        logp, top = _of_goals(model, states[lines, places], torch.cat(goals).to(states.device))
        counts = [len(own) for own in goals]
        sums[asked] = [float(part.sum()) for part in logp.double().cpu().split(counts)]
        greedy[asked] = [bool(part.all()) for part in top.cpu().split(counts)]
    return sums, greedy


def _of_goals(model: Any, states: Tensor, goals: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each goal, and whether it is the likeliest; logits as the model rounds
    them, softmax in FP32."""
    size = max(1, (1 << (27 if states.is_cuda else 26)) // len(model.lm_head.weight))
    logp, top = [], []
    for part, goal in zip(states.split(size), goals.split(size), strict=True):
        found = functional.log_softmax(model.lm_head(part), 1, dtype=torch.float32)
        logp.append(found.gather(1, goal[:, None])[:, 0])
        top.append(found.argmax(1) == goal)
    return torch.cat(logp), torch.cat(top)


def _batches(lengths: Mapping[int, int], tokens_a_batch: int) -> Iterator[list[int]]:
    """Sequences, longest first, so many that their padded tokens are at most `tokens_a_batch`."""
    rest = sorted(lengths, key=lambda sequence: -lengths[sequence])
    while rest:
        count = max(1, tokens_a_batch // lengths[rest[0]])
        yield rest[:count]
        rest = rest[count:]

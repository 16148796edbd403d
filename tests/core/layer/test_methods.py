"""`quantize_layer`: every method against an independent float64 implementation, and by property."""

import functools
import itertools

import ml_dtypes
import numpy as np
import pytest
import torch

from dpq_core.arithmetic.affine import ColumnGrid
from dpq_core.layer.column_loop import FactorizationError, quantize_columns
from dpq_core.layer.column_order import column_order
from dpq_core.layer.gradient_rounding import refine_codes
from dpq_core.layer.grid import choose_grid
from dpq_core.layer.hessian import InputStatistics
from dpq_core.layer.quantize import quantize_layer
from dpq_core.recipe.scheme import Scheme

ROWS, FEATURES = 48, 136  # with groups of 32, a last group of 8
ORDERS = ("none", "gar", "activation")


def scheme_of(method, **changes):
    inner = "none" if method == "gptq" else "e4m3"
    return Scheme(
        **{"method": method, "inner": inner, "activations": "none", "group_size": 32} | changes
    )


def statistics_of(hessian):
    """Statistics whose Hessian is exactly the one given."""
    magnitudes = torch.zeros(1 << 15, dtype=torch.int64)
    magnitudes[16256] = 1  # a one
    return InputStatistics(hessian.clone(), 1, magnitudes)


@functools.cache
def correlated(seed=0, rows=ROWS, features=FEATURES):
    """A weight and the Hessian of inputs with strong correlations and outlier features."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    low_rank = torch.randn(features, 4, generator=generator)
    x = torch.randn(2000, features, generator=generator) @ mixing
    x += torch.randn(2000, 4, generator=generator) @ low_rank.T
    x *= torch.rand(features, generator=generator).mul(2).exp()
    weight = torch.randn(rows, features, generator=generator) / 20
    return weight.bfloat16().float(), 2 * x.T @ x / len(x)


def quantized(weight, hessian, scheme):
    return quantize_layer(weight, statistics_of(hessian), scheme)


def objective(weight, decoded, hessian):
    difference = np.asarray(decoded, dtype=np.float64) - weight.double().numpy()
    return float(np.einsum("oi,ij,oj->", difference, hessian.double().numpy(), difference))


# An independent implementation of DESIGN's steps 1-3, float64 wherever nothing is stored


class Reference:
    def __init__(self, weight, scheme):
        self.scheme, self.weight = scheme, weight.double().numpy()
        self.limit = {"e4m3": scheme.fp8_max, "int8": 127, "none": None}[scheme.inner]
        self.s8 = np.ones((len(weight), 1))
        if self.limit:
            amax = np.abs(self.weight).max(1, keepdims=True)
            self.s8 = (amax / (self.limit * 14 / 15)).astype(np.float32).astype(np.float64)
        scaled = self.weight / self.s8
        image = scaled if scheme.method in ("gptq", "naive") else self.inner(scaled)
        scales, zeros = [], []
        for start in range(0, weight.shape[1], scheme.group_size):
            group = image[:, start : start + scheme.group_size]
            low, high = np.minimum(group.min(1), 0), np.maximum(group.max(1), 0)
            width = 2 * np.maximum(-low, high) if scheme.symmetric else high - low
            scale = (width / 15).astype(ml_dtypes.bfloat16).astype(np.float64)
            scales.append(scale)
            zeros.append(np.full_like(scale, 8) if scheme.symmetric else np.rint(-low / scale))
        of_column = np.arange(weight.shape[1]) // scheme.group_size
        self.s4, self.z = np.stack(scales, 1)[:, of_column], np.stack(zeros, 1)[:, of_column]

    def inner(self, values):
        if not self.limit:
            return values
        clipped = np.clip(values, -self.limit, self.limit)
        if self.scheme.inner == "int8":
            return np.rint(clipped)
        return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    def encode(self, column, j):
        steps = np.rint(column / self.s8[:, 0] / self.s4[:, j]) + self.z[:, j]
        return np.clip(steps, 0, 15)

    def decode(self, codes, rounded=True):
        values = self.s4 * (codes - self.z)
        return self.s8 * (self.inner(values) if rounded else values)

    def order(self, diagonal):
        if self.scheme.order == "none":
            return list(range(len(diagonal)))
        if self.scheme.order == "activation":
            return sorted(range(len(diagonal)), key=lambda j: -diagonal[j])
        size = self.scheme.group_size
        groups = [
            sorted(range(start, min(start + size, len(diagonal))), key=lambda j: -diagonal[j])
            for start in range(0, len(diagonal), size)
        ]
        groups.sort(key=lambda group: (len(group) < size, -diagonal[group[0]]))
        return [j for group in groups for j in group]

    def codes(self, hessian):
        codes = np.zeros_like(self.weight)
        if self.scheme.method == "rtn":
            for j in range(codes.shape[1]):
                codes[:, j] = self.encode(self.weight[:, j], j)
            return codes
        hessian = hessian.double().numpy()
        order = self.order(np.diag(hessian))
        damping = self.scheme.damp_frac * np.diag(hessian).mean()
        ordered = hessian[np.ix_(order, order)] + damping * np.eye(len(order))
        upper = np.linalg.cholesky(np.linalg.inv(ordered)).T
        work = self.weight[:, order].copy()
        for position, j in enumerate(order):
            codes[:, j] = self.encode(work[:, position], j)
            decoded = self.decode(codes, rounded=self.scheme.method != "naive")[:, j]
            error = (work[:, position] - decoded) / upper[position, position]
            work[:, position:] -= np.outer(error, upper[position, position:])
        return codes


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("gptq", {}),
        ("gptq", {"symmetric": True}),
        ("naive", {}),
        ("naive", {"inner": "int8"}),
        ("dpq", {}),
        ("dpq", {"fp8_max": 240}),
        ("dpq", {"inner": "int8"}),
        ("dpq", {"symmetric": True}),
        ("rtn", {}),
    ],
    ids=str,
)
def test_agrees_with_float64_numpy(method, changes, order):
    """FP32 sees a tie differently now and then, and the error that it passes on moves later codes
    of the same row: at most 0.5 % of the codes, and next to nothing of the objective."""
    weight, hessian = correlated()
    scheme = scheme_of(method, order=order, rounding="nearest", block_columns=24, **changes)
    reference = Reference(weight, scheme)
    expected = reference.codes(hessian)
    layer = quantized(weight, hessian, scheme)
    codes = layer.weight.codes.numpy()
    assert (codes != expected).mean() <= 0.005
    np.testing.assert_allclose(layer.decoded().numpy(), reference.decode(codes), rtol=1e-6)
    ours = objective(weight, layer.decoded(), hessian)
    assert ours == pytest.approx(objective(weight, reference.decode(expected), hessian), rel=0.01)
    zero = objective(weight, torch.zeros_like(weight), hessian)
    assert layer.report.error == pytest.approx(ours / zero, rel=1e-3)


# Properties of the loop


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("method", "inner"), [("gptq", "none"), ("dpq", "e4m3"), ("dpq", "int8")])
def test_diagonal_hessian_leaves_nothing_to_compensate(method, inner, order):
    weight, hessian = correlated()
    diagonal = hessian.diagonal().diag()
    changes = {"inner": inner, "order": order, "rounding": "nearest"}
    compensated = quantized(weight, diagonal, scheme_of(method, **changes))
    nearest = quantized(weight, diagonal, scheme_of("rtn", **changes))
    assert torch.equal(compensated.weight.codes, nearest.weight.codes)


def on_grid_weight(amax8):
    """Weights that the grid holds exactly: every group has codes 0 and 15 and a scale that is a
    power of two times a small integer; the first group's largest value is the row's, `amax8`."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (ROWS, 5, 32), generator=generator).float()
    codes[..., 0], codes[..., 1] = 0, 15
    zero = torch.randint(16, (ROWS, 5, 1), generator=generator).float()
    exponent = torch.randint(-4, 0, (ROWS, 5, 1), generator=generator)
    scale = amax8 / 15 * 2.0**exponent
    zero[:, 0], scale[:, 0] = 0, amax8 / 15
    row_scale = 2.0 ** torch.randint(-14, -6, (ROWS, 1), generator=generator)
    codes, weight = codes.flatten(1), (scale * (codes - zero)).flatten(1) * row_scale
    return weight[:, :FEATURES], codes[:, :FEATURES]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("method", "changes", "amax8"),
    [
        ("gptq", {}, 60),
        ("rtn", {"power_of_two": True}, 240),
        ("naive", {"power_of_two": True}, 240),
        ("dpq", {"power_of_two": True}, 240),
        ("dpq", {"power_of_two": True, "fp8_max": 240}, 120),
        ("dpq", {"power_of_two": True, "scale_search": "hessian"}, 240),
    ],
    ids=str,
)
def test_on_grid_weights_are_a_fixed_point(method, changes, amax8, order):
    weight, codes = on_grid_weight(amax8)
    hessian = correlated()[1]
    layer = quantized(weight, hessian, scheme_of(method, order=order, **changes))
    assert torch.equal(layer.weight.codes.float(), codes)
    assert torch.equal(layer.decoded(), weight)
    assert layer.report.error == 0
    assert layer.report.codes_moved == 0


@pytest.mark.parametrize("rounding", ["nearest", "gradient"])
@pytest.mark.parametrize("method", ["gptq", "dpq"])
def test_row_permutations_commute(method, rounding):
    weight, hessian = correlated()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    scheme = scheme_of(method, rounding=rounding)
    straight = quantized(weight, hessian, scheme).weight
    permuted = quantized(weight[order], hessian, scheme).weight
    assert torch.equal(permuted.grid.group_scale, straight.grid.group_scale[order])
    differing = (permuted.codes != straight.codes[order]).double().mean()
    assert differing <= 0.005  # products may sum another row's terms in another order


@pytest.mark.parametrize("rounding", ["nearest", "gradient"])
@pytest.mark.parametrize("method", ["gptq", "dpq"])
def test_block_columns_do_not_matter(method, rounding):
    weight, hessian = correlated()
    layers = [
        quantized(weight, hessian, scheme_of(method, rounding=rounding, block_columns=width))
        for width in (1, 32, FEATURES, 4096)
    ]
    expected = layers[0]
    for layer in layers[1:]:
        assert (layer.weight.codes != expected.weight.codes).double().mean() <= 0.01
        assert layer.report.error == pytest.approx(expected.report.error, rel=0.01)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rounding", ["nearest", "gradient"])
@pytest.mark.parametrize("seed", range(3))
def test_dpq_is_below_naive_is_below_rtn(seed, rounding, order):
    weight, hessian = correlated(seed)
    naive, dpq = (
        quantized(weight, hessian, scheme_of(method, rounding=rounding, order=order))
        for method in ("naive", "dpq")
    )
    rtn = quantized(weight, hessian, scheme_of("rtn", rounding="nearest"))
    errors = [objective(weight, layer.decoded(), hessian) for layer in (dpq, naive, rtn)]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("seed", range(3))
def test_ordering_by_activation_helps_where_features_differ(seed):
    weight, hessian = correlated(seed)
    errors = [
        quantized(weight, hessian, scheme_of("dpq", rounding="nearest", order=order)).report.error
        for order in ("none", "activation")
    ]
    assert errors[1] < errors[0]


# Gradient-aware rounding


def rounded(scheme, passes, seed=0):
    """Codes [in, out] before and after `passes`, the number moved, and the columns' grid."""
    weight, hessian = correlated(seed)
    columns = choose_grid(weight, scheme, None).at(torch.arange(FEATURES))
    before = quantize_columns(weight.T.contiguous(), columns, None, 32)
    after = before.clone()
    moved = refine_codes(after, weight.T.contiguous(), columns, hessian, 32, passes)
    return before, after, moved, columns


@pytest.mark.parametrize(
    "changes",
    [{}, {"fp8_max": 240}, {"inner": "int8"}, {"inner": "none"}, {"symmetric": True}],
    ids=str,
)
@pytest.mark.parametrize("seed", range(2))
def test_no_pass_raises_the_objective(changes, seed):
    scheme = scheme_of("rtn", **changes)
    weight, hessian = correlated(seed)
    results = [rounded(scheme, passes, seed) for passes in range(1, 6)]
    steps = [results[0][0], *(after for _, after, _, _ in results)]
    columns = results[0][3]
    errors = [objective(weight, columns.decode(codes).T, hessian) for codes in steps]
    assert all(after <= before for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    for codes in steps:
        assert ((codes >= 0) & (codes <= 15) & (codes == codes.round())).all()


def test_no_row_gets_worse():
    weight, hessian = correlated()
    before, after, _, columns = rounded(scheme_of("rtn"), 8)
    for row in range(ROWS):
        alone = weight[row : row + 1]
        errors = [
            objective(alone, columns.decode(codes).T[row : row + 1], hessian)
            for codes in (before, after)
        ]
        assert errors[1] <= errors[0]


def test_passes_stop_when_nothing_moves_and_at_the_most_allowed():
    scheme = scheme_of("rtn")
    weight, hessian = correlated()
    _, once, moved_once, columns = rounded(scheme, 1)
    _, settled, moved, _ = rounded(scheme, 1000)
    assert 0 < moved_once < moved  # one pass is not enough here
    assert not torch.equal(once, settled)
    again = settled.clone()
    assert refine_codes(again, weight.T.contiguous(), columns, hessian, 32, 1000) == 0
    assert torch.equal(again, settled)


@pytest.mark.parametrize(("most", "moved", "passes"), [(2, 3 + 2, 2), (99, 3 + 2 + 1, 4)])
def test_rows_in_which_nothing_moved_take_no_further_pass(most, moved, passes, monkeypatch):
    moves = [[2, 1, 0], [1, 1], [0, 1], [0]]  # of the rows that are left, pass by pass
    taken = []

    def one_pass(codes, weight, grid, *_):
        assert torch.equal(weight[0], grid.channel_scale[0])  # both of the same rows
        taken.append(weight[0].tolist())
        codes += 1
        return torch.tensor(moves[len(taken) - 1])

    monkeypatch.setattr("dpq_core.layer.gradient_rounding._one_pass", one_pass)
    monkeypatch.setattr("dpq_core.kernels.cpu.fits", lambda *_: False)
    codes, names = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])
    grid = ColumnGrid(names, names, names, torch.zeros(1, dtype=torch.int64), None)
    assert refine_codes(codes, names, grid, torch.eye(1), 1, most) == moved
    assert taken == [[1, 2, 3], [1, 2], [1, 2], [2]][:passes]
    assert codes[0].tolist() == [sum(name in rows for rows in taken) for name in (1, 2, 3)]


@pytest.mark.parametrize("method", ["gptq", "naive", "dpq"])
def test_rounding_gradient_improves_on_the_loop(method):
    weight, hessian = correlated()
    nearest = quantized(weight, hessian, scheme_of(method, rounding="nearest", order="none"))
    gradient = quantized(weight, hessian, scheme_of(method, rounding="gradient", order="none"))
    assert nearest.report.codes_moved == 0
    assert gradient.report.codes_moved > 0
    if method != "naive":  # naive's passes do not see the 8-bit rounding
        assert gradient.report.error < nearest.report.error


# Column orders


def test_gar_by_example():
    diagonal = torch.tensor([1.0, 3, 2, 9, 8, 9, 3, 0, 3, 50, 99])
    assert column_order(diagonal, "gar", 3).tolist() == [3, 5, 4, 1, 2, 0, 6, 8, 7, 10, 9]


@pytest.mark.parametrize("features", [64, 70, 12, 16])
@pytest.mark.parametrize("seed", range(3))
def test_gar_keeps_groups_together_and_a_short_one_last(features, seed):
    size = 16
    diagonal = torch.randint(5, (features,), generator=torch.Generator().manual_seed(seed)).float()
    order = column_order(diagonal, "gar", size)
    assert order.sort().values.tolist() == list(range(features))
    groups = [part // size for part in order.split(size)]
    assert all((group == group[0]).all() for group in groups)
    leading = [diagonal[part].max().item() for part in order.split(size)]
    whole = features // size
    assert leading[:whole] == sorted(leading[:whole], reverse=True)
    if features % size:
        assert groups[-1][0] == whole
    for part in order.split(size):
        assert sorted(part.tolist(), key=lambda j: (-diagonal[j], j)) == part.tolist()
    ties = [(-value, int(group[0])) for value, group in zip(leading, groups, strict=True)][:whole]
    assert ties == sorted(ties)


def test_activation_and_none():
    diagonal = torch.tensor([1.0, 3, 2, 3])
    assert column_order(diagonal, "activation", 2).tolist() == [1, 3, 2, 0]
    assert column_order(diagonal, "none", 2).tolist() == [0, 1, 2, 3]


# What cannot be quantized is said


def test_indefinite_hessian_is_an_error():
    hessian = torch.eye(FEATURES)
    hessian[0, 0] = -50
    with pytest.raises(FactorizationError, match="not positive definite with damping 10 "):
        quantized(correlated()[0], hessian, scheme_of("dpq"))


@pytest.mark.parametrize(("eigenvalue", "damping"), [(0.0, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_grows_and_is_reported(eigenvalue, damping):
    """One direction of the identity is given an eigenvalue that only enough damping lifts."""
    direction = torch.ones(FEATURES, 1) / FEATURES**0.5
    hessian = torch.eye(FEATURES) - (1 - eigenvalue) * direction @ direction.T
    layer = quantized(correlated()[0], hessian, scheme_of("dpq", rounding="nearest"))
    assert layer.report.damp_frac == pytest.approx(damping)


@pytest.mark.parametrize("method", ["none", "rtn", "dpq"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weight_that_is_not_finite_is_refused(bad, method):
    weight, hessian = correlated()
    weight = weight.clone()
    weight[3, 7] = bad
    with pytest.raises(ValueError, match="weight has NaN or infinite"):
        quantized(weight, hessian, scheme_of(method))


def test_shapes_that_do_not_fit_are_refused():
    weight, hessian = correlated()
    with pytest.raises(ValueError, match=r"\[48, 135\] does not fit inputs of 136"):
        quantized(weight[:, 1:], hessian, scheme_of("dpq"))


# The rest of the scheme


@pytest.mark.parametrize("method", ["rtn", "naive", "dpq"])
@pytest.mark.parametrize(
    "changes",
    [
        {"fp8_max": 240},
        {"inner": "int8"},
        {"symmetric": True},
        {"power_of_two": True},
        {"channel_scale": "tensor"},
        {"scale_search": "mse"},
        {"scale_search": "hessian"},
        {"group_size": 136},
        {"group_size": 200},
    ],
    ids=str,
)
def test_every_option_gives_a_usable_layer(method, changes):
    weight, hessian = correlated()
    scheme = scheme_of(method, **changes)
    layer = quantized(weight, hessian, scheme)
    assert layer.weight.codes.dtype == torch.uint8
    assert layer.weight.codes.max() == 15
    decoded = layer.weight.grid.decode8(layer.weight.codes)
    limit = 127 if scheme.inner == "int8" else scheme.fp8_max
    assert limit / 3 < decoded.abs().max() <= limit
    assert 0 < layer.report.error < 0.03


def test_statistics_and_weight_are_left_as_they_were():
    weight, hessian = correlated()
    statistics, copy = statistics_of(hessian), weight.clone()
    quantize_layer(weight, statistics, scheme_of("dpq"))
    assert torch.equal(weight, copy)
    assert torch.equal(statistics.hessian_sum, hessian)


def test_same_inputs_give_the_same_bits():
    weight, hessian = correlated()
    first, second = (quantized(weight, hessian, scheme_of("dpq")) for _ in range(2))
    assert torch.equal(first.weight.codes, second.weight.codes)
    assert first.report == second.report


@pytest.mark.parametrize(("activations", "scale"), [("static", 1 / 448), ("dynamic", None)])
def test_method_none_keeps_the_bf16_weight(activations, scale):
    weight, hessian = correlated()
    layer = quantized(weight, hessian, scheme_of("none", activations=activations))
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.bfloat16())
    assert (layer.input_scale and layer.input_scale.item()) == (scale and pytest.approx(scale))
    assert layer.report.error == 0

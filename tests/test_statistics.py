"""objective_statistics: the masked sums and what follows from them, against the reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import FLOATS, LAYOUTS, SUM_ERROR, Problem, batches, clippings, copied, make, poisoned

import pama_kernels as pk
from pama_kernels import reference
from pama_kernels.statistics import FIELDS, PAIRS

INF, NAN = math.inf, math.nan
REFERENCE_NAMES = {
    "count": "present_count",
    "logprob_sum": "bound_logprob_sum",
}
ROUNDED = ("surrogate_sum", "kl")  # they hold exponentials; on the grid the other sums are exact


def sums(statistics: Any, n: int) -> dict[str, torch.Tensor]:
    """Every sum by its name, from the buffer of the library or from the reference."""
    if isinstance(statistics, reference.Statistics):
        named = {name: getattr(statistics, REFERENCE_NAMES.get(name, name)) for name in FIELDS}
        return {**named, "token_count": statistics.token_count, "kl": statistics.kl_sum}
    buffer = statistics.buffer
    named = {name: buffer[k * n : (k + 1) * n] for k, name in enumerate(FIELDS)}
    named["token_count"], named["kl"] = buffer[len(FIELDS) * n], buffer[len(FIELDS) * n + 1]
    return named


def assert_matches(problem: Problem, exact: bool = True, **options: Any) -> pk.ObjectiveStatistics:
    """Against the reference; `exact`: inputs on the grid, so that only exponentials are rounded."""
    n, arguments = problem.objectives, problem.statistics_arguments()
    got = pk.objective_statistics(**arguments, **options, gram=True)
    wanted = reference.objective_statistics(**arguments, **options)
    sizes = absolute_sums(problem, **options)
    for name, value in sums(wanted, n).items():
        result = sums(got, n)[name]
        # float32 over at most 256 tokens: 256 roundings of the sum, 16 of a term
        tolerance = SUM_ERROR * problem.eps() * sizes[name]
        if name.endswith("count") or (exact and name not in ROUNDED):
            tolerance = 0 * sizes[name]
        assert ((result - value).abs() <= tolerance).all(), (name, result, value)
    for name in ("scores", "second_moments", "gram", "conflict", "overlap"):
        result, value = getattr(got, name), getattr(wanted, name)
        if exact:  # the same float64 operations on the same sums, in another order
            assert torch.allclose(result, value, rtol=1e-13, atol=1e-13), (name, result, value)
        elif name != "conflict":  # quotients of the sums above, whose terms do not cancel with Noon
            assert torch.allclose(result, value, rtol=2 * SUM_ERROR * problem.eps(), atol=0), name
    count = wanted.token_count.clamp(min=1)
    assert torch.allclose(got.approx_kl * count, wanted.kl_sum, rtol=SUM_ERROR * problem.eps(), atol=1e-12)
    for name, total in (("positive_fraction", "positive_count"), ("clip_fraction", "clipped_count")):
        share = getattr(wanted, total) / wanted.present_count.clamp(min=1)
        assert torch.allclose(getattr(got, name), share, rtol=1e-15, atol=0), name
    return got


def absolute_sums(problem: Problem, **options: Any) -> dict[str, torch.Tensor]:
    """The same sums without any cancellation: over |A|, and over -|A| too."""
    options["noon"] = False
    arguments = problem.statistics_arguments()
    size = arguments["advantages"].double().abs().nan_to_num(0.0, 0.0)
    parts = [
        sums(
            reference.objective_statistics(**{**arguments, "advantages": s * size}, **options), size.shape[-1]
        )
        for s in (1, -1)
    ]
    return {name: parts[0][name].abs() + parts[1][name].abs() for name in parts[0]}


# --- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("mask_objectives", [False, True])
def test_every_layout(layout: str, noon: bool, mask_objectives: bool) -> None:
    for seed, mask, ratio, weighted in (
        (0, torch.bool, True, True),
        (1, None, True, False),
        (2, torch.bool, False, True),
    ):
        problem = make(
            layout,
            rows=4,
            width=7,
            objectives=3,
            seed=seed,
            mask=mask,
            ratio=ratio,
            objective_mask=torch.bool if mask_objectives else None,
            importance_weights=weighted,
        )
        assert_matches(problem, noon=noon)


@given(
    problem=batches(
        shapes=((1, 1), (3, 5), (5, 17), (2, 40)),
        objectives=(1, 2, 3, 4, 5, 9),
        dtypes=(torch.float32, torch.float64),
    ),
    clipping=clippings(),
    noon=st.booleans(),
)
def test_every_option(problem: Problem, clipping: dict[str, Any], noon: bool) -> None:
    assert_matches(problem, noon=noon, **clipping)


@given(
    kinds=st.tuples(*[st.sampled_from(FLOATS)] * 4),
    layout=st.sampled_from(LAYOUTS),
    offsets=st.sampled_from([torch.int32, torch.int64]),
)
def test_every_mix_of_dtypes(kinds: tuple[torch.dtype, ...], layout: str, offsets: torch.dtype) -> None:
    names = ("logprobs", "old_logprobs", "advantages", "importance_weights")
    dtype = dict(zip(names, kinds, strict=True))
    problem = make(layout, rows=4, width=9, dtype=dtype, importance_weights=True, offsets=offsets, seed=5)
    assert_matches(problem, noon=False)


@pytest.mark.parametrize("n", [1, 3, 8, 70])
@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "packed-per-sequence", "flat"])
def test_many_tokens(n: int, layout: str) -> None:
    """Rows longer than a tile, rows that end within one, and more tokens than one block."""
    width = 700 if n < 70 else 150
    problem = make(layout, rows=16, width=width, objectives=n, importance_weights=True)
    assert_matches(problem)
    assert_matches(make(layout, rows=5, width=300, objectives=n, objective_mask=torch.bool), noon=False)


def test_instruction_sets_agree(isa: str) -> None:
    for n in (1, 2, 3, 4, 8):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            problem = make(rows=3, width=301, objectives=n, dtype=dtype, importance_weights=True)
            assert_matches(problem, noon=False, dual_clip=3.0)
        assert_matches(
            make("packed", rows=9, width=90, objectives=n, objective_mask=torch.bool, overflow=True)
        )


def random_problem(seed: int = 0, tokens: tuple[int, int] = (6, 400), n: int = 4) -> Problem:
    """Normally distributed float32 inputs, off the grid."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(tokens, generator=g) * 5
    return Problem(
        logprobs=logp,
        old_logprobs=logp - 0.3 * torch.randn(tokens, generator=g),
        advantages=torch.randn(*tokens, n, generator=g),
        mask=torch.rand(tokens, generator=g) < 0.8,
        importance_weights=torch.rand(tokens, generator=g) * 2,
    )


@pytest.mark.parametrize("noon", [True, False])
def test_inputs_off_the_grid(noon: bool) -> None:
    problem = random_problem()
    n, arguments = problem.objectives, problem.statistics_arguments()
    got = sums(pk.objective_statistics(**arguments, noon=noon), n)
    wanted = sums(reference.objective_statistics(**arguments, noon=noon), n)
    sizes = absolute_sums(problem)
    for name, value in wanted.items():
        # see assert_matches; d is rounded too, which 5 eps |logp| relative to u covers
        assert ((got[name] - value).abs() <= SUM_ERROR * problem.eps() * sizes[name]).all(), name


@pytest.mark.parametrize("k", [1e-38, 1e-30, 1e-22, 1e-10, 1e10, 1e22, 1e30, 1e37])
@pytest.mark.parametrize("noon", [True, False])
def test_magnitudes(k: float, noon: bool) -> None:
    """Advantages whose squares float32 does not hold."""
    base = random_problem(seed=2, tokens=(2, 300), n=3)
    for size in (torch.tensor([k, k, k]), torch.tensor([1.0, k, 1.0]), torch.tensor([k, 1.0, k])):
        problem = replace(base, advantages=base.advantages * size)
        n, arguments = 3, problem.statistics_arguments()
        got = sums(pk.objective_statistics(**arguments, noon=noon), n)
        wanted = sums(reference.objective_statistics(**arguments, noon=noon), n)
        sizes = absolute_sums(problem)
        # products of a term may be subnormal in float32: half of 1.4e-45 each, 600 tokens
        subnormal = 600 * 1.5e-45
        for name, value in wanted.items():
            tolerance = SUM_ERROR * problem.eps() * sizes[name] + subnormal * (k < 1e-20)
            if name in ("bound_square_sum", "advantage_square_sum"):
                tolerance = SUM_ERROR * problem.eps() * sizes[name]
            assert ((got[name] - value).abs() <= tolerance).all(), (name, got[name], value)


def test_small_log_ratios_keep_the_digits_of_the_divergence() -> None:
    """e^d - 1 - d does not cancel."""
    for d in (1e-3, 1e-5, 1e-8, -1e-5, -0.25, 0.3, 0.4, 1.0, -3.0, 19.9, -19.9):
        for dtype in (torch.float32, torch.float64):
            logp = torch.full((1, 5), d, dtype=dtype)
            old = torch.zeros_like(logp)
            advantages = torch.ones(1, 5, 2, dtype=dtype)
            got = pk.objective_statistics(logp, old, advantages).approx_kl
            x = float(logp[0, 0])
            # Taylor series below 1/8, where the difference of the reference cancels
            wanted = (
                math.expm1(x) - x if abs(x) > 0.125 else sum(x**k / math.factorial(k) for k in range(2, 14))
            )
            # 16 roundings of the term, of u where that is larger: above |d| = log(2)/2
            size = wanted if abs(x) < 0.34 else wanted + math.exp(x) + 1 + abs(x)
            assert abs(float(got) - wanted) <= 16 * torch.finfo(dtype).eps * size


def test_finite_logprobs_whose_difference_overflows() -> None:
    logp = torch.tensor([[3e38, -3e38, 1.0, 0.0]])
    problem = Problem(logp, -logp, torch.ones(1, 4, 2))
    got = pk.objective_statistics(**problem.statistics_arguments())
    wanted = reference.objective_statistics(**problem.statistics_arguments())
    assert torch.allclose(got.scores, wanted.scores, rtol=1e-6)
    assert torch.equal(got.clip_fraction, torch.tensor([0.75, 0.75]).double())
    assert torch.isfinite(got.approx_kl)


def test_properties_of_conflict_and_overlap() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (4, 50), generator=g).float() / 4
    advantages = torch.stack([a, -a, 2 * a, torch.zeros_like(a), a.abs()], -1)
    s = pk.objective_statistics(None, None, advantages, gram=True)
    assert s.conflict is not None
    assert s.overlap is not None
    assert s.gram is not None
    # float64 of exact sums: variances to 1e-15 of the squares
    assert s.conflict[0, 1] == pytest.approx(-1, abs=1e-12)
    assert s.conflict[0, 2] == pytest.approx(1, abs=1e-12)
    assert (s.conflict[3] == 0).all()
    assert s.overlap[0, 1] == 0  # the positive parts of a and -a never meet
    assert s.overlap[0, 2] == pytest.approx(1, abs=1e-12)
    for matrix in (s.conflict, s.overlap, s.gram):
        assert torch.equal(matrix, matrix.T)
    assert (torch.linalg.eigvalsh(s.gram) >= -1e-12).all()
    plain = pk.objective_statistics(None, None, advantages)
    assert plain.gram is plain.conflict is plain.overlap is None
    assert torch.equal(plain.scores, s.scores)


# --- merging ---------------------------------------------------------------------------------------------


@given(cut=st.integers(0, 6), seed=st.integers(0, 99), gram=st.booleans(), absent=st.booleans())
def test_micro_batches_add_up(cut: int, seed: int, gram: bool, absent: bool) -> None:
    problem = make(rows=6, width=11, seed=seed, objective_mask=torch.bool if absent else None)
    arguments = problem.statistics_arguments()
    whole = pk.objective_statistics(**arguments, gram=gram)
    parts = []
    for rows in (slice(0, cut), slice(cut, 6)):
        part = {k: None if v is None else v[rows] for k, v in arguments.items()}
        parts.append(pk.objective_statistics(**part, gram=gram))
    merged = parts[0] + parts[1]
    assert merged.has_gram is gram
    kl = len(FIELDS) * 3 + 1
    surrogate = slice(FIELDS.index("surrogate_sum") * 3, (FIELDS.index("surrogate_sum") + 1) * 3)
    rounded = torch.zeros(len(whole.buffer), dtype=torch.bool)
    rounded[kl] = True
    rounded[surrogate] = True
    assert torch.equal(merged.buffer[~rounded], whole.buffer[~rounded])  # exact on the grid
    # advantages up to 2, ratios up to 1.2 at 66 tokens
    assert ((merged.buffer - whole.buffer)[rounded].abs() <= SUM_ERROR * problem.eps() * 66 * 3).all()


def test_a_batch_without_valid_tokens_adds_nothing() -> None:
    problem = make(mask=torch.bool)
    assert problem.mask is not None
    arguments = problem.statistics_arguments()
    some = pk.objective_statistics(**arguments, gram=True)
    arguments["mask"] = torch.zeros_like(problem.mask)
    none = pk.objective_statistics(**arguments, gram=True)
    assert (none.buffer == 0).all()
    assert torch.equal((some + none).buffer, some.buffer)
    for name in ("scores", "second_moments", "clip_fraction", "conflict", "overlap", "gram", "approx_kl"):
        assert (getattr(none, name) == 0).all()


# --- what has influence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_values_have_no_influence(layout: str, bad: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        problem = make(
            layout,
            rows=4,
            width=9,
            dtype=dtype,
            importance_weights=True,
            objective_mask=torch.bool,
        )
        for noon in (True, False):
            clean = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, gram=True)
            dirty = poisoned(problem, bad).statistics_arguments()
            assert torch.equal(pk.objective_statistics(**dirty, noon=noon, gram=True).buffer, clean.buffer)


def test_what_counts_as_masked() -> None:
    """Zero of either sign masks; anything else is valid, however small or wide."""
    advantages = torch.ones(1, 4, 2)
    for values, dtype in (
        ([0.0, -0.0, 1e-300, 0.5], torch.float64),
        ([0.0, -0.0, 1e-40, -2.0], torch.float32),
        ([0.0, -0.0, 1e-7, 1.0], torch.float16),
        ([0.0, -0.0, 1e-39, 1.0], torch.bfloat16),
        ([0, 0, 2**32, -1], torch.int64),
        ([0, 0, 256, -1], torch.int16),
        ([0, 0, 128, 255], torch.uint8),
    ):
        mask = torch.tensor([values], dtype=dtype)
        assert float(pk.objective_statistics(None, None, advantages, mask).token_count) == 2


DEPENDENT = {  # sums that a value at a valid place reaches
    "advantages": {
        "bound_sum",
        "bound_square_sum",
        "logprob_sum",
        "surrogate_sum",
        "advantage_sum",
        "advantage_square_sum",
    },
    "logprobs": {"bound_sum", "bound_square_sum", "logprob_sum", "surrogate_sum", "kl"},
    "old_logprobs": {"bound_sum", "bound_square_sum", "logprob_sum", "surrogate_sum", "kl"},
    "importance_weights": {"bound_sum", "bound_square_sum", "logprob_sum", "surrogate_sum"},
}
UNSPECIFIED = {  # counts of comparisons with a NaN; kl beside a bad importance weight
    "advantages": {"positive_count", "clipped_count"},
    "logprobs": {"positive_count", "clipped_count"},
    "old_logprobs": {"positive_count", "clipped_count"},
    "importance_weights": {"positive_count", "clipped_count", "kl"},
}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", sorted(DEPENDENT))
@pytest.mark.parametrize("noon", [True, False])
def test_a_nan_or_infinity_reaches_what_depends_on_it(name: str, bad: float, noon: bool) -> None:
    problem = make(rows=3, width=300, importance_weights=True, mask=None)
    before = pk.objective_statistics(**problem.statistics_arguments(), noon=noon, gram=True)
    changed = copied(problem)
    getattr(changed, name)[(1, 280, 1) if name == "advantages" else (1, 280)] = bad
    after = pk.objective_statistics(**changed.statistics_arguments(), noon=noon, gram=True)
    wanted = reference.objective_statistics(**changed.statistics_arguments(), noon=noon)
    touched = torch.tensor([name != "advantages", True, name != "advantages"])
    for field, value in sums(after, 3).items():
        old, specified = sums(before, 3)[field], sums(wanted, 3)[field]
        if field in UNSPECIFIED[name]:
            continue
        # a tile with a NaN may be summed in another precision
        rounding = SUM_ERROR * problem.eps() if field in ROUNDED else 0.0
        if field not in DEPENDENT[name]:
            assert torch.allclose(value, old, rtol=rounding, atol=0), field
            assert torch.isfinite(specified).all(), field
        elif value.dim() == 0:
            assert value.isnan(), field
            assert specified.isnan(), field
        else:
            assert torch.equal(value.isnan(), touched), field
            assert torch.allclose(value[~touched], old[~touched], rtol=rounding, atol=0), field
            assert torch.equal(~torch.isfinite(specified), touched), (field, specified)
    pairs = touched[:, None] | touched
    assert torch.equal(after.gram.isnan(), pairs)
    assert torch.equal(after.gram[~pairs], before.gram[~pairs])
    assert torch.equal(after.scores.isnan(), touched)
    assert torch.equal(after.conflict.isnan(), pairs & (name == "advantages"))


def test_absent_objectives_keep_others_clean() -> None:
    """A bad log-probability reaches only the objectives that are present at its token."""
    problem = make(rows=2, width=4, mask=None)
    problem = replace(problem, objective_mask=torch.tensor([[True, True, False], [False, True, True]]))
    problem.logprobs[0, 2] = NAN
    s = pk.objective_statistics(**problem.statistics_arguments(), noon=False)
    assert s.scores.isnan().tolist() == [True, True, False]
    r = reference.objective_statistics(**problem.statistics_arguments(), noon=False)
    assert r.scores.isnan().tolist() == [True, True, False]


# --- bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "per-sequence", "packed", "objectives-first"])
def test_same_bits_for_every_number_of_threads(layout: str) -> None:
    problem = make(layout, rows=40, width=600, objectives=4, importance_weights=True)
    noise = torch.Generator().manual_seed(0)
    rough = problem.advantages + 0.01 * torch.randn(problem.advantages.shape, generator=noise)
    problem = replace(problem, advantages=rough)
    results = []
    for number in (1, 2, 3, 2):
        torch.set_num_threads(number)
        results.append(pk.objective_statistics(**problem.statistics_arguments(), gram=True).buffer)
    for buffer in results[1:]:
        assert torch.equal(buffer, results[0])


def test_the_layout_does_not_change_the_result() -> None:
    """Views and copies of the same tokens: the same sums, bit for bit."""
    problem = random_problem(tokens=(5, 300))
    arguments = problem.statistics_arguments()
    wanted = pk.objective_statistics(**arguments, gram=True).buffer
    stored = problem.advantages.movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(
        pk.objective_statistics(**{**arguments, "advantages": stored}, gram=True).buffer, wanted
    )
    flat = {k: None if v is None else v.flatten(0, 1) for k, v in arguments.items()}
    assert torch.equal(pk.objective_statistics(**flat, gram=True).buffer, wanted)
    cu = torch.arange(0, 1501, 300, dtype=torch.int32)
    packed = {**flat, "cu_seqlens": cu}
    assert torch.equal(pk.objective_statistics(**packed, gram=True).buffer, wanted)
    every_second = torch.stack([cu, cu - 7], 1)[:, 0]
    assert torch.equal(
        pk.objective_statistics(**{**packed, "cu_seqlens": every_second}, gram=True).buffer, wanted
    )


def test_broadcast_inputs() -> None:
    problem = make(rows=4, width=6)
    arguments = problem.statistics_arguments()
    arguments["mask"] = torch.tensor([1, 0, 1, 1, 1, 0])[None].expand(4, 6)
    arguments["importance_weights"] = torch.tensor(0.5).expand(4, 6)
    got = pk.objective_statistics(**arguments).buffer
    copies = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert torch.equal(got, pk.objective_statistics(**copies).buffer)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_no_tokens(shape: tuple[int, int]) -> None:
    logp = torch.zeros(shape)
    cases: list[dict[str, Any]] = [
        {"logprobs": logp, "advantages": torch.zeros(*shape, 3)},
        {"logprobs": logp, "advantages": torch.zeros(shape[0], 3), "objective_mask": torch.ones(shape[0], 3)},
        {"logprobs": logp.flatten(), "advantages": torch.zeros(0, 3)},
        {
            "logprobs": logp.flatten(),
            "advantages": torch.zeros(0, 3),
            "cu_seqlens": torch.zeros(shape[0] + 1, dtype=torch.int64),
        },
    ]
    for case in cases:
        s = pk.objective_statistics(old_logprobs=case["logprobs"], **case, gram=True)
        assert (s.buffer == 0).all()
        assert s.buffer.shape == (len(FIELDS) * 3 + 2 + len(PAIRS) * 9,)
        assert (s.scores == 0).all()

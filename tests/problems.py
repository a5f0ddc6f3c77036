"""Generators of RL batches in every layout and dtype, and the scales that tolerances are made of.

Values lie on a dyadic grid that float16 and bfloat16 hold exactly: advantages are multiples of 1/8 up to 2,
log-probabilities and log-ratios multiples of 1/16, importance weights multiples of 1/2. Sums of I, I^2,
I_i I_j, A', A'^2 and I logp over a tile of 256 tokens are then exact in float32, so that scores are the same
numbers in every precision and ties are ties. No log-ratio lies near log(1 - eps) or log(1 + eps) of a clip
range used in the tests, or near the log of a dual clip.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pama_kernels import Fixed, Pama, SoftMin, UPGrad, reference

INF = math.inf
DEVICE = torch.device(os.environ.get("PAMA_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
ON_TRITON = os.environ.get("PAMA_BACKEND") == "triton"
LAYOUTS = (
    "padded",
    "strided",
    "objectives-first",
    "per-sequence",
    "flat",
    "packed",
    "packed-per-sequence",
)
SEQUENCE_LAYOUTS = tuple(layout for layout in LAYOUTS if layout != "flat")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASKS = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, *FLOATS)
WEIGHTS_PER = ("batch", "sequence", "token")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
# Every kind of rule. Those of UPGrad and of "gram" without regularization are not unique on the grid.
BATCH_RULES = (Pama(), Pama(bound="scores"), Pama(bound="scores", noon=True), Pama.paper("batch"), Fixed())
SEQUENCE_RULES = (Pama("sequence"), Pama.paper("sequence"), SoftMin(0.5))
TOKEN_RULES = (Pama("token"), Pama.paper("token"), SoftMin(0.5, "token"))
RULES = (*BATCH_RULES, *SEQUENCE_RULES, *TOKEN_RULES, UPGrad(), Pama(regularization=0.0))
CLIPS: tuple[Any, ...] = (0.2, (0.2, 0.28), (0.0, 0.0), (1.0, INF), (0.0, INF), (1.0, 0.2), 0.5)
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
# Float32 runs over at most 256 tokens (error at most 256 eps of the sum of the sizes); 16 roundings per term.
SUM_ERROR = 272


def same(x: Tensor, y: Tensor) -> bool:
    """Bitwise equal. On a GPU a call with other addresses, strides or optional tensors may run another
    variant of a kernel, which adds in another order: there up to rounding."""
    if not ON_GPU or x.dtype == torch.bool:
        return torch.equal(x, y)
    rounding = 2.0**-44 if x.dtype == torch.float64 else max(2.0**-18, torch.finfo(x.dtype).eps)
    return torch.allclose(x, y, rtol=rounding, atol=rounding * 2.0**-4, equal_nan=True)


@dataclass(frozen=True)
class Problem:
    """The tensors of one call, in the caller's layout."""

    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None = None
    objective_mask: Tensor | None = None
    importance_weights: Tensor | None = None
    ref_logprobs: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @property
    def objectives(self) -> int:
        return self.advantages.shape[-1]

    @property
    def rows(self) -> int:
        """Sequences; 1 where tensors are flat."""
        if self.cu_seqlens is not None:
            return len(self.cu_seqlens) - 1
        return self.logprobs.shape[0] if self.logprobs.dim() == 2 else 1

    @property
    def flat(self) -> bool:
        """Without sequences."""
        return self.logprobs.dim() == 1 and self.cu_seqlens is None

    def statistics_arguments(self) -> dict[str, Any]:
        names = ("logprobs", "old_logprobs", "advantages", "mask", "objective_mask")
        names += ("importance_weights", "cu_seqlens")
        return {name: getattr(self, name) for name in names}

    def loss_arguments(self) -> dict[str, Any]:
        return {**self.statistics_arguments(), "ref_logprobs": self.ref_logprobs}

    def combine_arguments(self, ratio: bool = True) -> dict[str, Any]:
        names = ("advantages", "mask", "objective_mask", "cu_seqlens")
        names += ("logprobs", "old_logprobs") if ratio else ()
        return {name: getattr(self, name) for name in names}

    def valid(self) -> Tensor:
        """bool, like logprobs."""
        return torch.ones_like(self.logprobs, dtype=torch.bool) if self.mask is None else self.mask != 0

    def wide(self) -> bool:
        """Whether the library computes in float64."""
        values = (x for name, x in vars(self).items() if not name.endswith("mask"))
        return any(x is not None and x.dtype == torch.float64 for x in values)

    def eps(self) -> float:
        return EPS64 if self.wide() else EPS32


def make(
    layout: str = "padded",
    *,
    rows: int = 3,
    width: int = 5,
    objectives: int = 3,
    seed: int = 0,
    dtype: torch.dtype | dict[str, torch.dtype] = torch.float32,
    mask: torch.dtype | None = torch.bool,
    ratio: bool = True,
    objective_mask: torch.dtype | None = None,
    importance_weights: bool = False,
    ref_logprobs: bool = False,
    overflow: bool = False,
    offsets: torch.dtype = torch.int32,
) -> Problem:
    """A batch on the grid. `dtype`: of all float inputs, or by name; `ratio`: with old log-probabilities;
    `overflow`: some log-ratios beyond +-20. About a fifth of the tokens are masked; a row may be empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=g)
    if rows > 2:
        lengths[1], lengths[2] = 0, width
    packed = layout.startswith("packed")
    if packed:
        shape: tuple[int, ...] = (int(lengths.sum()),)
    elif layout == "flat":
        shape = (rows * width,)
    else:
        shape = (rows, width)
    per_sequence = layout.endswith("per-sequence")
    first = (rows,) if per_sequence else shape

    def whole(low: int, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, size, generator=g).double()

    def cast(name: str, x: Tensor) -> Tensor:
        chosen = dtype.get(name, torch.float32) if isinstance(dtype, dict) else dtype
        return x.to(chosen)

    logp = whole(-64, 0, shape) / 16
    step = whole(-20, 20, shape) / 16
    if overflow:
        far = whole(0, 5, shape)
        step = torch.where(far == 0, 21.0, torch.where(far == 1, -21.0, step))
    valid = torch.rand(shape, generator=g) < 0.8
    if len(shape) == 2:
        valid &= torch.arange(width) < lengths[:, None]
    adv = whole(-16, 16, (*first, objectives)) / 8
    if objectives > 1:  # ties between objectives, and zeros
        adv[..., 1] = torch.where(whole(0, 3, first) == 0, adv[..., 0], adv[..., 1])
    here = torch.rand((rows if layout != "flat" else shape[0], objectives), generator=g) < 0.7
    problem = Problem(
        logprobs=cast("logprobs", logp),
        old_logprobs=cast("old_logprobs", logp - step) if ratio else None,
        advantages=cast("advantages", adv),
        mask=None if mask is None else valid.to(mask),
        objective_mask=None if objective_mask is None else here.to(objective_mask),
        importance_weights=cast("importance_weights", whole(0, 3, shape) / 2) if importance_weights else None,
        ref_logprobs=cast("ref_logprobs", logp + whole(-16, 16, shape) / 16) if ref_logprobs else None,
    )
    if packed:
        cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        return replace(problem, cu_seqlens=cu.to(offsets))
    if layout == "strided":
        return replace(problem, **{k: _strided(v) for k, v in vars(problem).items() if v is not None})
    if layout == "objectives-first":
        stored = problem.advantages.movedim(-1, 0).contiguous()
        return replace(problem, advantages=stored.movedim(0, -1))
    return problem


def _strided(x: Tensor) -> Tensor:
    """The same values in every second place of a larger array, last axis reversed in memory order."""
    host = torch.zeros([2 * size + 1 for size in x.shape], dtype=x.dtype)
    view = host[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def copied(x: Any) -> Any:
    """A problem whose tensors may be written to, with the same strides."""
    return replace(x, **{k: v.clone() for k, v in vars(x).items() if v is not None})


def poisoned(problem: Problem, bad: float) -> Problem:
    """`bad` at every place that is masked, or where an objective is absent."""
    p = copied(problem)
    valid = p.valid()
    per_token = ("logprobs", "old_logprobs", "importance_weights", "ref_logprobs")
    for name in per_token:
        if getattr(p, name) is not None:
            getattr(p, name)[~valid] = bad
    objectives = p.objectives
    if p.advantages.shape[:-1] == valid.shape:
        p.advantages[~valid] = bad
        if p.objective_mask is not None:
            absent = p.objective_mask == 0
            if absent.shape == p.advantages.shape:
                p.advantages[absent] = bad
            elif p.cu_seqlens is None:
                p.advantages[absent[:, None].expand(*valid.shape, objectives)] = bad
            else:
                p.advantages[absent.repeat_interleave(p.cu_seqlens.diff(), 0)] = bad
    elif p.objective_mask is not None:
        p.advantages[p.objective_mask == 0] = bad
    return p


def loss_scale(problem: Problem, **options: Any) -> tuple[float, Tensor]:
    """Sum of the sizes of the terms of the loss, and the size of the terms of its gradient per token.

    All weights are 1 or as given, and both signs of each advantage are counted; nothing cancels.
    """
    options = {k: v for k, v in options.items() if k not in ("rule", "preference")}
    given = options.pop("weights", None)
    options["weights"] = torch.ones(problem.objectives) if given is None else given.abs()
    kl_coef = options.pop("kl_coef", 0.0)
    arguments = problem.loss_arguments()
    size = torch.where(torch.isfinite(problem.advantages.double()), problem.advantages.double().abs(), 0)
    value, gradient = 0.0, torch.zeros(problem.logprobs.shape, dtype=torch.float64)
    for sign in (1, -1):
        arguments["advantages"] = sign * size
        value += abs(float(reference.pama_loss(**arguments, **options).loss))
    arguments["advantages"] = size
    options.update(clip_range=(1.0, INF), dual_clip=None)
    cases: list[tuple[dict[str, Any], dict[str, float]]] = [(arguments, {})]
    if kl_coef:
        assert problem.ref_logprobs is not None
        # Value and gradient at |r| + 1 are above every intermediate result at r.
        r = (problem.ref_logprobs.double() - problem.logprobs.double()).abs()
        zero = {**arguments, "advantages": 0 * size, "ref_logprobs": problem.logprobs.double() + r + 1}
        cases.append((zero, {"kl_coef": kl_coef}))
    for given_arguments, extra in cases:
        leaf = problem.logprobs.detach().double().requires_grad_()
        loss = reference.pama_loss(**{**given_arguments, "logprobs": leaf}, **options, **extra).loss
        if loss.requires_grad:
            loss.backward()
            assert leaf.grad is not None
            gradient += leaf.grad.abs()
        if extra:
            value += abs(float(loss.detach()))
    return value, gradient


def reference_gradient(problem: Problem, **options: Any) -> tuple[Any, Tensor]:
    """The reference's result and the float64 gradient of its loss."""
    leaf = problem.logprobs.detach().double().requires_grad_()
    result = reference.pama_loss(**{**problem.loss_arguments(), "logprobs": leaf}, **options)
    if result.loss.requires_grad:
        result.loss.backward()
    gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return result._replace(loss=result.loss.detach()), gradient


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    shapes: Sequence[tuple[int, int]] = ((3, 5),),
    objectives: Sequence[int] = (1, 2, 3, 4, 6),
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> Problem:
    """A problem of `make`, in every layout, with or without what is optional; `shapes`: rows and width."""
    layout, n = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(objectives))
    rows, width = draw(st.sampled_from(shapes))
    return make(
        layout,
        rows=rows,
        width=width,
        objectives=n,
        seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from(dtypes)),
        mask=draw(st.sampled_from([None, *MASKS])),
        objective_mask=draw(st.sampled_from([None, *MASKS])),
        ratio=draw(st.booleans()),
        importance_weights=draw(st.booleans()),
        overflow=draw(st.booleans()),
        ref_logprobs=True,
    )


@st.composite
def clippings(draw: st.DrawFn) -> dict[str, Any]:
    """clip_range, and a dual_clip above it."""
    clip_range = draw(st.sampled_from(CLIPS))
    high = clip_range[1] if isinstance(clip_range, tuple) else clip_range
    above = [x for x in (3.0, 40.0) if x > 1 + high]
    return {"clip_range": clip_range, "dual_clip": draw(st.sampled_from([None, *above]))}


def weightings(draw: st.DrawFn, problem: Problem) -> dict[str, Any]:
    """A rule whose weights are unique, and a preference or given weights."""
    n = problem.objectives
    rules = (*BATCH_RULES, *TOKEN_RULES, *(() if problem.flat else SEQUENCE_RULES))
    options: dict[str, Any] = {
        "rule": draw(st.sampled_from(rules)),
        "preference": draw(
            st.sampled_from([None, [float(1 + i % 3) for i in range(n)], [0.0] * (n - 1) + [2.0]])
        ),
    }
    given = draw(st.sampled_from([None, None, None, "shared", "per row"]))
    if given == "shared" or (given and problem.flat):
        options["weights"] = torch.arange(1, n + 1).to(draw(st.sampled_from(FLOATS))) / 8
    elif given:
        options["weights"] = torch.arange(problem.rows * n).reshape(problem.rows, n).float() % 5 / 4
    return options


def solution_error(problem: Problem, options: dict[str, Any], dtype: torch.dtype) -> float:
    """How far weights are from the reference's: they are solved in float64, per token in the type of the
    computation, and stored in float32 unless `dtype` is float64. On the grid lambda <= 64 (n-term sums)."""
    by_token = getattr(options.get("rule"), "weights_per", "batch") == "token"
    eps = problem.eps() if by_token else EPS64
    stored = EPS64 if dtype == torch.float64 else EPS32
    return 64 * 8 * problem.objectives * max(eps, 2 * EPS64) + stored

"""`pama_loss` by one native call gives what the checked path gives, and is taken for plain tensors only."""

from __future__ import annotations

import itertools
from typing import Any

import problems
import pytest
import torch
from torch import Tensor

import pama_kernels as pk
from pama_kernels.backends import operators
from pama_kernels.backends.registry import find

if not hasattr(find("cpu", "apply"), "quick_loss"):
    pytest.skip("the backend has no fast path", allow_module_level=True)
pytestmark = pytest.mark.skipif(
    not hasattr(Tensor, "__dlpack_c_exchange_api__"), reason="torch < 2.10: no DLPack exchange table"
)


class Quick:
    """Counts the calls that the fast path answers; `off`: it answers none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answered, self.off = 0, False
        quick = operators.quick_loss

        def counted(*arguments: Any) -> Any:
            found = None if self.off else quick(*arguments)
            self.answered += found is not None
            return found

        monkeypatch.setattr(operators, "quick_loss", counted)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Quick:
    return Quick(monkeypatch)


def results(p: problems.Problem, **settings: Any) -> list[Tensor]:
    leaf = p.logprobs.detach().requires_grad_()
    made = pk.pama_loss(leaf, p.old_logprobs, p.advantages, p.mask, **settings)
    made.loss.backward()
    assert leaf.grad is not None
    return [made.loss.detach(), leaf.grad, made.weights, made.optimum, made.statistics.buffer]


LAYOUTS = ("padded", "strided", "objectives-first", "per-sequence")
OPTIONS = list(itertools.product(problems.FLOATS, (None, torch.bool, torch.int64), (False, True)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", [*problems.RULES], ids=str)
def test_same_bits_as_the_checked_path(layout: str, rule: Any, quick: Quick) -> None:
    for k, (dtype, mask, ratio) in enumerate(OPTIONS):
        p = problems.make(layout, rows=4, width=6, dtype=dtype, mask=mask, ratio=ratio, seed=k)
        clip_range = k / len(OPTIONS)
        quick.off = False
        own = results(p, rule=rule, clip_range=clip_range)
        assert quick.answered == k + 1
        quick.off = True
        for x, y in zip(own, results(p, rule=rule, clip_range=clip_range), strict=True):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert torch.equal(x, y)


def test_without_gradient_and_statistics(quick: Quick) -> None:
    p = problems.make(rows=4, width=6)
    made = pk.pama_loss(p.logprobs, p.old_logprobs, p.advantages, p.mask, statistics=False, rule="fixed")
    assert quick.answered == 1
    assert not made.loss.requires_grad
    with torch.no_grad():
        again = pk.pama_loss(p.logprobs.clone().requires_grad_(), p.old_logprobs, p.advantages, p.mask)
    assert quick.answered == 2
    assert not again.loss.requires_grad


P = problems.make(rows=3, width=3)
TENSORS = ("logprobs", "old_logprobs", "advantages", "mask")
NOT_QUICK: dict[str, dict[str, Any]] = {
    "flat": {k: getattr(P, k)[0] for k in TENSORS},
    "no tokens": {k: getattr(P, k)[:, :0] for k in TENSORS},
    "parameter": {"logprobs": torch.nn.Parameter(P.logprobs.clone())},
    "negated": {"old_logprobs": torch._neg_view(-P.old_logprobs)},
    "preference": {"preference": [1, 2, 3]},
    "a function as rule": {"rule": lambda s: torch.ones(3) / 3},
    "clip range of two numbers": {"clip_range": (0.1, 0.2)},
    "coefficient as a tensor": {"kl_coef": torch.tensor(0.0), "ref_logprobs": P.logprobs},
}


@pytest.mark.parametrize("name", list(NOT_QUICK))
def test_other_arguments_take_the_checked_path(name: str, quick: Quick) -> None:
    given = {k: getattr(P, k) for k in TENSORS}
    assert torch.isfinite(pk.pama_loss(**{**given, **NOT_QUICK[name]}).loss)
    assert quick.answered == 0


INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "shape of the mask": ({"mask": P.mask[:2]}, "^mask: "),
    "shape of the advantages": ({"advantages": P.advantages[:2]}, "^advantages: "),
    "dtype": ({"old_logprobs": P.logprobs.long()}, "^old_logprobs: "),
    "not a tensor": ({"mask": [1, 0, 1]}, "^mask: "),
    "freed storage": ({"advantages": P.advantages.clone()}, "^advantages: "),
    "sparse": ({"old_logprobs": P.old_logprobs.to_sparse()}, "^old_logprobs: "),
    "device": ({"mask": P.mask.to("meta")}, "^mask: "),
    "range": ({"clip_range": 1.5}, "^clip_range: "),
    "not a number": ({"clip_range": float("nan")}, "^clip_range: "),
    "flag": ({"statistics": 1}, "^statistics: "),
}


@pytest.mark.parametrize("name", list(INVALID))
def test_invalid_arguments_are_named(name: str, quick: Quick) -> None:
    given = {k: getattr(P, k) for k in TENSORS}
    wrong, message = INVALID[name]
    if name == "freed storage":
        wrong["advantages"].untyped_storage().resize_(0)
    with pytest.raises((TypeError, ValueError), match=message):
        pk.pama_loss(**{**given, **wrong})
    assert quick.answered == 0

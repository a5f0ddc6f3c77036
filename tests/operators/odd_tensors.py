"""Every tensor argument of every public function as an unusual tensor: right, or an error with its name.

A script, because what is tested for may end the process: it prints a line before and after each case.
`python odd_tensors.py SKIP` leaves out the first SKIP cases; PYTHONPATH holds the folder of the tests.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from operator_table import EVERY, leaves
from torch import Tensor
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh


class Labelled(Tensor):
    pass


class Wrapper(Tensor):
    """A tensor without memory of its own, as those of quantized or distributed weights."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype
        )
        made.wrapped = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(x: Any) -> Any:
            return x.wrapped if isinstance(x, Wrapper) else x

        return function(*map(unwrap, args), **{k: unwrap(v) for k, v in (kwargs or {}).items()})


def _strided(x: Tensor) -> Tensor:
    host = torch.zeros([2 * size + 1 for size in x.shape], dtype=x.dtype)
    return host[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def _freed(x: Tensor) -> Tensor:
    made = x.clone()
    made.untyped_storage().resize_(0)
    return made


def _nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor(list(x.unbind()), layout=layout)


def _float(x: Tensor) -> bool:
    return x.is_floating_point()


# Kind of tensor: (made from a plain one, for which of them, outcomes that are good).
RIGHT, EITHER, REFUSED = ("right",), ("right", "refused"), ("refused",)
Maker = Callable[[Tensor], Tensor]
KINDS: dict[str, tuple[Maker, Callable[[str, Tensor], bool], tuple[str, ...]]] = {
    "strided": (_strided, lambda n, x: x.dim() > 0, RIGHT),
    "reversed axes": (lambda x: x.mT.contiguous().mT, lambda n, x: x.dim() > 1, RIGHT),
    "offset": (lambda x: torch.cat([x[:1], x])[1:], lambda n, x: x.dim() > 0, RIGHT),
    "expanded": (
        lambda x: x[:1].expand_as(x),
        lambda n, x: x.dim() > 0 and n not in ("cu_seqlens", "preference"),
        RIGHT,
    ),
    "negated view": (
        lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
        lambda n, x: _float(x),
        RIGHT,
    ),
    "subclass": (lambda x: x.clone().as_subclass(Labelled), lambda n, x: True, RIGHT),
    "parameter": (lambda x: torch.nn.Parameter(x.clone()), lambda n, x: _float(x), RIGHT),
    "requires grad": (lambda x: x.clone().requires_grad_(), lambda n, x: _float(x), RIGHT),
    "non-leaf": (lambda x: x.clone().requires_grad_() * 1, lambda n, x: _float(x), RIGHT),
    "inference tensor": (_inference, lambda n, x: True, RIGHT),
    "wrapper": (Wrapper, lambda n, x: True, EITHER),
    "DTensor": (
        lambda x: distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()]),
        lambda n, x: True,
        EITHER,
    ),
    "ZeroTensor": (
        lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda n, x: n not in ("cu_seqlens", "preference") and x.dim() > 0,
        EITHER,
    ),
    "freed storage": (_freed, lambda n, x: True, REFUSED),
    "freed storage, half": (lambda x: _freed(x.bfloat16()), lambda n, x: _float(x), REFUSED),
    "sparse": (lambda x: x.to_sparse(), lambda n, x: x.dim() > 0, REFUSED),
    "CSR": (lambda x: x.to_sparse_csr(), lambda n, x: x.dim() == 2, REFUSED),
    "nested": (lambda x: _nested(x, torch.strided), lambda n, x: x.dim() > 1, REFUSED),
    "jagged": (lambda x: _nested(x, torch.jagged), lambda n, x: x.dim() > 1, REFUSED),
    "MKL-DNN": (lambda x: x.to_mkldnn(), lambda n, x: x.dtype == torch.float32 and x.dim() > 0, REFUSED),
}
SHAPE = (3, 4)


def cases() -> Iterator[tuple[str, str, str]]:
    for call, entry in EVERY.items():
        for argument, x in entry.tensors(*SHAPE).items():
            yield from ((call, argument, kind) for kind, (_, fits, _) in KINDS.items() if fits(argument, x))


def outcome(call: str, argument: str, kind: str) -> str:
    entry = EVERY[call]
    tensors = entry.tensors(*SHAPE)
    odd = KINDS[kind][0](tensors[argument])
    plain = tensors[argument]
    if kind == "ZeroTensor":
        plain = torch.zeros_like(plain)
    if kind == "expanded":
        plain = odd.contiguous()
    wanted = leaves(entry.run(**{**tensors, argument: plain}))
    try:
        found = leaves(entry.run(**{**tensors, argument: odd}))
    except Exception as error:  # any: what it says is judged
        message = str(error).splitlines()[0]
        if argument in message and "INTERNAL" not in message:
            return "refused"
        return f"refused without its name: {type(error).__name__}: {message[:120]}"
    if kind in ("wrapper", "DTensor", "subclass"):
        found = [getattr(x, "wrapped", getattr(x, "_local_tensor", x)).detach() for x in found]
    for x, y in zip(found, wanted, strict=True):
        if x.dtype != y.dtype or not torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)):
            return f"WRONG: {x.flatten()[:3].tolist()} instead of {y.flatten()[:3].tolist()}"
    return "right"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for number, case in enumerate(cases()):
        if number >= int(sys.argv[1]):
            print(number, "begins", flush=True)
            print(number, outcome(*case), flush=True)
    os._exit(0)  # gloo's threads would wait for a peer


if __name__ == "__main__":
    main()

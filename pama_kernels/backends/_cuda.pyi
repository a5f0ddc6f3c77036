"""The native CUDA module. Results go into given tensors; `Memory` gives float64 memory on the device."""

from collections.abc import Callable

from torch import Tensor

from pama_kernels._call import Rule, Tokens

Memory = Callable[[int], Tensor]
# (2 N + 1) float64: weights, preference over the objectives with a signal, optimum.
Batch = tuple[Tensor]
Rounded = tuple[Tensor, Tensor, Tensor]  # the same, then weights and optimum in another dtype
# Combined advantages, weights, optimum, sums, their sum of squares, factors of the loss (B, 3).
Sequences = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None]
Where = tuple[int, int, int]  # device, its multiprocessors, address of the stream

class NoMemory(ValueError): ...

def use_exchange(table: object) -> bool: ...
def contract() -> dict[str, list[str]]: ...
def build_info() -> dict[str, object]: ...
def device_problem() -> str: ...
def statistics(
    tokens: Tokens,
    pairs: bool,
    sums: Tensor,
    rule: Rule | None,  # the weights too, of FIXED and SCORES in the same launch
    preference: Tensor | None,
    results: Batch | Rounded | None,
    counter: Tensor,
    where: Where,
) -> None: ...
def sequences(
    tokens: Tokens,
    rule: Rule | None,
    preference: Tensor | None,
    asked: tuple[bool, bool, bool, bool, bool],  # pairs, combined, normalize, factors, float64 weights
    counter: Tensor,
    where: Where,
) -> Sequences | None: ...
def solve(
    sums: Tensor,
    objectives: int,
    rule: Rule,
    preference: Tensor | None,
    results: Batch | Rounded,
    where: Where,
) -> None: ...
def weights(
    scores: Tensor,  # (rows, n)
    preference: Tensor | None,
    regularization: float,
    scale: Tensor | None,  # (rows,) float64
    result: Tensor,
    optimum: Tensor,
    empty: Memory,
    where: Where,
) -> None: ...
def min_norm(
    gram: Tensor,  # (rows, n, n)
    preference: Tensor | None,
    regularization: float,
    result: Tensor,
    optimum: Tensor,
    empty: Memory,
    where: Where,
) -> None: ...
def upgrad(
    gram: Tensor,
    preference: Tensor | None,
    regularization: float,
    result: Tensor,
    optimum: Tensor,
    empty: Memory,
    where: Where,
) -> None: ...

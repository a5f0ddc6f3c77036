"""The native CPU module.

It reads records by field and tensors with their strides. The caller allocates contiguous results; `apply`
allocates them if it gets the class `Results`, with `nothing` for those that are not requested.
"""

from torch import Tensor

from pama_kernels._call import Outputs, Results, Rule, Tokens

from .arguments import Gae

class NoMemory(ValueError): ...

def build_info() -> dict[str, object]: ...
def contract() -> dict[str, list[str]]: ...
def use_isa(name: str) -> str: ...
def use_exchange(table: object) -> bool: ...
def statistics(tokens: Tokens, pairs: bool, sums: Tensor, threads: int) -> None: ...
def solve(
    sums: Tensor,
    rule: Rule,
    preference: Tensor | None,
    objectives: int,
    weights: Tensor,
    optimum: Tensor,
    effective: Tensor,
) -> None: ...
def apply(
    tokens: Tokens,
    rule: Rule,
    preference: Tensor | None,
    weights: Tensor | None,
    outputs: Outputs,
    results: Results | type[Results],
    nothing: Tensor,
    threads: int,
) -> Results: ...
def quick_loss(
    tensors: tuple[Tensor | None, ...],
    rule: Rule,
    clip_range: float,
    noon: bool,
    outputs: Outputs,
    results: type[Results],
    nothing: Tensor,
    threads: int,
) -> Results | None: ...
def weights(
    scores: Tensor,
    preference: Tensor | None,
    regularization: float,
    scale: Tensor | None,
    weights: Tensor,
    optimum: Tensor,
    threads: int,
) -> None: ...
def min_norm(
    gram: Tensor,
    preference: Tensor | None,
    regularization: float,
    weights: Tensor,
    optimum: Tensor,
    threads: int,
) -> int: ...
def upgrad(
    gram: Tensor, preference: Tensor | None, weights: Tensor, optimum: Tensor, threads: int
) -> int: ...
def quick_weights(scores: Tensor, regularization: float, threads: int) -> tuple[Tensor, Tensor] | None: ...
def quick_min_norm(gram: Tensor, regularization: float, threads: int) -> tuple[Tensor, Tensor] | None: ...
def quick_upgrad(gram: Tensor, regularization: float, threads: int) -> tuple[Tensor, Tensor] | None: ...
def gae(problem: Gae, advantages: Tensor, returns: Tensor, threads: int) -> None: ...
def group_normalize(
    rewards: Tensor,
    group_begin: Tensor,
    order: Tensor,
    scale: bool,
    eps: float,
    result: Tensor,
    threads: int,
) -> None: ...

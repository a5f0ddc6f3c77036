"""The native CPU module. Tensors are (pointer, dtype, row stride, token stride, objective stride)."""

from torch import Tensor

Array = tuple[int, int, int, int, int]
Problem = tuple[object, ...]

def build_info() -> dict[str, object]: ...
def use_isa(name: str) -> str: ...
def use_exchange(table: object) -> bool: ...
def quick_weights(scores: Tensor, regularization: float, threads: int) -> tuple[Tensor, Tensor] | None: ...
def quick_min_norm(gram: Tensor, regularization: float, threads: int) -> tuple[Tensor, Tensor] | None: ...
def statistics(problem: Problem, pairs: bool, sums: int, threads: int) -> None: ...
def batch_weights(
    sums: int,
    objectives: int,
    gram: bool,
    prior: int,
    regularization: float,
    wide: bool,
    weights: int,
    optimum: int,
) -> None: ...
def apply(
    problem: Problem,
    weights_per: int,
    prior: int,
    uniform: bool,
    regularization: float,
    given: Array | None,
    given_per_row: bool,
    aggregation: int,
    normalizer: float,
    kl_coef: float,
    combined: Array | None,
    combined_per_row: bool,
    gradient: Array | None,
    loss: Array | None,
    weights: Array | None,
    optimum: Array | None,
    sums: int,
    pairs: bool,
    threads: int,
) -> None: ...
def weights(
    rows: int,
    objectives: int,
    scores: Array,
    prior: int,
    uniform: bool,
    regularization: float,
    scale: Array | None,
    weights: int,
    optimum: int,
    threads: int,
) -> None: ...
def min_norm(
    rows: int,
    objectives: int,
    wide: bool,
    gram: int,
    batch_stride: int,
    row_stride: int,
    column_stride: int,
    prior: int,
    regularization: float,
    weights: int,
    optimum: int,
    threads: int,
) -> int: ...
def multi_objective_gae(
    rows: int,
    width: int,
    objectives: int,
    gamma: float,
    lam: float,
    rewards: Array | None,
    values: Array | None,
    mask: Array | None,
    dones: Array | None,
    last_values: Array | None,
    advantages: Array | None,
    returns: Array | None,
    threads: int,
) -> None: ...
def group_normalize(
    groups: int,
    group_begin: int,
    order: int,
    objectives: int,
    rewards: Array | None,
    scale: bool,
    eps: float,
    result: Array | None,
    threads: int,
) -> None: ...

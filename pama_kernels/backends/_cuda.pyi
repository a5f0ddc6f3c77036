"""The native CUDA module. Tensors are device pointers, or (pointer, dtype, row, token, objective stride)."""

Array = tuple[int, int, int, int, int]
Problem = tuple[object, ...]
Solve = tuple[object, ...]  # gram, prior, regularization, wide, weights, optimum, work

def build_info() -> dict[str, object]: ...
def device_problem() -> str: ...
def statistics_partials(problem: Problem, pairs: bool, most: int) -> int: ...
def solve_work(objectives: int, gram: bool) -> int: ...
def weights_work(objectives: int) -> int: ...
def min_norm_work(objectives: int) -> int: ...
def statistics(
    problem: Problem,
    pairs: bool,
    most: int,
    partials: int,
    counter: int,
    sums: int,
    solve: Solve | None,
    device: int,
    stream: int,
) -> None: ...
def batch_weights(sums: int, objectives: int, solve: Solve, device: int, stream: int) -> None: ...
def weights(
    rows: int,
    objectives: int,
    scores: Array,
    prior: int,
    regularization: float,
    scale: Array | None,
    weights: int,
    optimum: int,
    work: int,
    slots: int,
    device: int,
    stream: int,
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
    work: int,
    slots: int,
    multiprocessors: int,
    device: int,
    stream: int,
) -> None: ...

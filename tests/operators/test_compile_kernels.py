"""`compile_kernels`: wrong arguments, and devices for which there is nothing to compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pama_kernels as pk


def test_on_the_cpu_no_kernel_is_compiled() -> None:
    assert pk.compile_kernels(4, device="cpu") == (0, 0.0)
    assert pk.compile_kernels(4, device=torch.device("cpu"), rule=["pama", pk.Fixed()]).kernels == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_error_gives_the_reason() -> None:
    with pytest.raises(
        RuntimeError, match=r"device: expected a GPU that Triton supports, got 'cuda': .*no GPU"
    ):
        pk.compile_kernels(4)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"objectives": 0}, ValueError, "objectives: expected at least 1, got 0"),
    ({"objectives": 2.0}, TypeError, "objectives: expected an integer, got float"),
    ({"objectives": True}, TypeError, "objectives: expected an integer, got bool"),
    ({"layout": "dense"}, ValueError, "layout: expected one of .*'per-sequence'.*, got 'dense'"),
    ({"functions": ["pama_loss", "loss"]}, ValueError, "functions: expected one of .*, got 'loss'"),
    ({"functions": "loss"}, ValueError, "functions: expected one of .*, got 'loss'"),
    ({"given": ["mask"]}, ValueError, "given: expected one of 'old_logprobs', .*, got 'mask'"),
    ({"rule": "mgda"}, ValueError, "rule: expected one of .*, got 'mgda'"),
    ({"aggregation": "mean"}, ValueError, "aggregation: expected one of .*, got 'mean'"),
    ({"logprobs_dtype": torch.int32}, TypeError, "logprobs_dtype: expected one of .*, got torch.int32"),
    ({"advantages_dtype": "float"}, TypeError, "advantages_dtype: expected one of .*, got 'float'"),
    ({"mask_dtype": torch.complex64}, TypeError, "mask_dtype: expected one of .*, got torch.complex64"),
    ({"preference": [1, 2, 3]}, ValueError, "preference: expected 2 numbers, got 3"),
    ({"preference": [-1.0, 2.0]}, ValueError, "preference: expected non-negative finite numbers"),
    ({"preference": torch.ones(3)}, ValueError, r"preference: expected shape \(2,\), got \(3,\)"),
    ({"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
    ({"group_size": 2.5}, TypeError, "group_size: expected an integer, got float"),
    ({"layout": "flat", "rule": pk.Pama("sequence")}, ValueError, "rule: .* need cu_seqlens, got Pama"),
    ({"layout": "flat", "aggregation": "seq-mean-token-sum"}, ValueError, "aggregation: .*cu_seqlens"),
    ({"merged": True, "rule": ["pama", "softmin"]}, ValueError, "merged: needs .*, got SoftMin"),
    ({"functions": None}, TypeError, "functions: expected a name or a list of names, got NoneType"),
    ({"given": 1}, TypeError, "given: expected a name or a list of names, got int"),
    ({"device": "cpuu"}, ValueError, "device: expected a device of torch, got 'cpuu'"),
    ({"device": None}, TypeError, "device: expected a torch.device or its name, got NoneType"),
    ({"merged": 1}, TypeError, "merged: expected True or False, got 1"),
    ({"slices": None}, TypeError, "slices: expected True or False, got None"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_errors_name_the_wrong_argument(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pk.compile_kernels(**{"objectives": 2, "device": "cpu", **arguments})

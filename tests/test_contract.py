"""The records and enumerations are the same in Python, in C++ and in the registry."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

from pama_kernels import _call
from pama_kernels._validate import AGGREGATIONS, FLOATS, MASKS
from pama_kernels.backends import registry


def spelled() -> dict[str, list[str]]:
    """The names of enumerations, records and fields that a native module must have."""
    dtypes = {str(dtype).removeprefix("torch.") for dtype in (*FLOATS, *MASKS)}
    return {
        "kinds": [kind.name for kind in _call.Kind],
        "weights_per": [per.name for per in _call.WeightsPer],
        "aggregations": [aggregation.name for aggregation in _call.Aggregation],
        "fields": list(_call.FIELDS),
        "totals": list(_call.TOTALS),
        "pairs": list(_call.PAIRS),
        "tokens": list(_call.Tokens._fields),
        "rule": list(_call.Rule._fields),
        "outputs": list(_call.Outputs._fields),
        "results": list(_call.Results._fields),
        "dtypes": sorted(dtypes),
    }


@pytest.mark.parametrize("extension", ["_cpu", "_cuda"])
def test_native_modules_agree_with_the_contract(extension: str) -> None:
    try:
        module = importlib.import_module(f"pama_kernels.backends.{extension}")
    except ImportError:
        pytest.skip(f"{extension} is not built")
    found, wanted = module.contract(), spelled()
    for name, names in found.items():
        assert (sorted(names) if name == "dtypes" else names) == wanted[name], name
    assert set(found) == set(wanted)


def test_enumerations_count_from_0() -> None:
    for enumeration in (_call.Kind, _call.WeightsPer, _call.Aggregation):
        assert [member.value for member in enumeration] == list(range(len(enumeration)))
    assert [a.name for a in _call.Aggregation] == [a.upper().replace("-", "_") for a in AGGREGATIONS]


@pytest.mark.parametrize("backend", registry.BACKENDS, ids=lambda backend: backend.name)
def test_backends_have_the_functions_that_their_records_list(backend: registry.Backend) -> None:
    assert set(backend.functions) <= {*registry.ALL, registry.SOLVED}
    try:
        module = importlib.import_module(f"pama_kernels.backends.{backend.name}")
    except ImportError as error:
        pytest.skip(f"{backend.name}: {error}")
    for name in backend.functions:
        wanted = list(inspect.signature(getattr(registry.Functions, name)).parameters)[1:]
        assert list(inspect.signature(getattr(module, name)).parameters)[: len(wanted)] == wanted, name
    missing = [name for name in registry.ALL if name not in backend.functions and hasattr(module, name)]
    assert not missing, f"not in the record: {missing}"


def test_the_statistics_layout_has_room_for_every_field() -> None:
    for n in (1, 3, 17):
        assert _call.statistics_size(n, False) == len(_call.FIELDS) * n + len(_call.TOTALS)
        assert _call.statistics_size(n, True) - _call.statistics_size(n, False) == len(_call.PAIRS) * n * n


def test_results_follow_the_widest_type() -> None:
    for dtype in FLOATS:
        wide = dtype == torch.float64
        assert _call.result_dtype(torch.ones(1, dtype=dtype)) == (torch.float64 if wide else torch.float32)

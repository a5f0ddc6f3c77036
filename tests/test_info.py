"""python -m pama_kernels.info, and the environment variable that chooses a backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

import pama_kernels as pk
from pama_kernels import info


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_printed_for_a_person() -> None:
    found = _python("-m", "pama_kernels.info", PAMA_BACKEND="")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    first_words = {line.split()[0]: line for line in lines if line.strip()}
    for name in ("pama-kernels", "torch", "triton", "numpy", "python", "platform", "processor", "features"):
        assert name in first_words, f"{name} is missing"
    assert pk.__version__ in first_words["pama-kernels"]
    assert torch.__version__.split("+")[0] in first_words["torch"]
    assert "threads" in first_words
    assert "not set" in first_words["PAMA_BACKEND"]
    for backend in ("cpu", "triton", "cuda"):
        assert any(word in first_words[backend].split() for word in ("yes", "no"))
    assert first_words["cpu"].split()[1:3] == ["yes", "yes"]


def test_printed_for_a_program() -> None:
    found = _python("-m", "pama_kernels.info", "--json", PAMA_BACKEND="cpu")
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert said["versions"]["pama-kernels"] == pk.__version__
    assert said["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert said["threads"] >= 1
    assert said["cores"] >= 1
    assert said["PAMA_BACKEND"] == "cpu"
    backends = {backend["name"]: backend for backend in said["backends"]}
    assert backends["cpu"]["built"]
    assert backends["cpu"]["usable"]
    for backend in backends.values():
        assert backend["detail"], "each backend says what it is, or why it is not usable"
        assert backend["built"] or not backend["usable"]


def test_says_what_is_used_and_why_the_others_are_not() -> None:
    statuses = {status.name: status for status in info.backends()}
    assert statuses["cpu"].usable
    assert any(isa in statuses["cpu"].detail for isa in ("portable", "avx2", "avx512", "neon"))
    assert "OpenMP" in statuses["cpu"].detail
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        for name in ("triton", "cuda"):
            assert not statuses[name].usable
            assert "not built" in statuses[name].detail or "GPU" in statuses[name].detail


def test_threads_are_those_of_torch() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert info.collect()["threads"] == 3
    finally:
        torch.set_num_threads(before)


def test_an_unknown_backend_is_named_on_use() -> None:
    use = "import torch, pama_kernels as pk; print('imported'); pk.pama_weights(torch.ones(3))"
    found = _python("-c", use, PAMA_BACKEND="wrong")
    assert found.returncode == 1
    assert found.stdout.strip() == "imported", "importing is not using"
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: PAMA_BACKEND: expected one of")
    assert "cpu" in last
    assert "'wrong'" in last
    printed = _python("-m", "pama_kernels.info", PAMA_BACKEND="wrong")
    assert printed.returncode == 0, "info still tells what there is"
    assert "wrong" in printed.stdout


def test_every_function_obeys_the_choice() -> None:
    program = """
import torch, pama_kernels as pk
x = torch.ones(2, 3, 4)
uses = {
    "loss": lambda: pk.pama_loss(x[..., 0], None, x, weights_per="batch"),
    "combine": lambda: pk.combine_advantages(x, weights_per="batch"),
    "statistics": lambda: pk.objective_statistics(None, None, x),
    "weights": lambda: pk.pama_weights(x),
    "gae": lambda: pk.multi_objective_gae(x, x),
    "normalize": lambda: pk.group_normalize(x[0]),
}
for name, use in uses.items():
    try:
        use()
        print(name, "ran")
    except ValueError as error:
        print(name, error)
"""
    wrong = _python("-c", program, PAMA_BACKEND="wrong")
    assert wrong.returncode == 0, wrong.stderr
    assert len(wrong.stdout.splitlines()) == 6
    assert all("PAMA_BACKEND: expected one of" in line for line in wrong.stdout.splitlines())
    right = _python("-c", program, PAMA_BACKEND="cpu")
    assert right.returncode == 0, right.stderr
    assert all(line.endswith(" ran") for line in right.stdout.splitlines()), right.stdout


def test_names_and_version() -> None:
    assert all(hasattr(pk, name) for name in pk.__all__)
    assert pk.__version__.count(".") == 2

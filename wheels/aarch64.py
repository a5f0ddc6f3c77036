"""Cross-builds the aarch64 wheel of the CPU module on x86-64 Debian, and runs it there under emulation.

    python wheels/aarch64.py [--out FOLDER] [--build-only] [--cpp] [--tests PYTEST_ARGUMENT ...]

It needs the Debian packages g++-aarch64-linux-gnu and qemu-user. Debian's own aarch64 Python (python3 of the
release that runs here) is unpacked into a folder; the wheel is for this version, and the same version for
x86-64 must be on the PATH. The wheel is repaired as those of build.py, installed beside PyTorch for aarch64
(a download of 3 GB), and checked by smoke.py under QEMU. `--cpp` runs the C++ tests under QEMU before that,
`--tests` a part of the test suite afterwards.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import build as native

MACHINE = "aarch64"
COMPILER = "aarch64-linux-gnu-g++"
TOOLS = (COMPILER, "aarch64-linux-gnu-strip", "qemu-aarch64", "apt-get", "dpkg")
TARGET = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": MACHINE, "CMAKE_CXX_COMPILER": COMPILER}
# PyTorch reads the processor's description from the system, where QEMU shows that of x86-64.
CPUINFO = """processor\t: {}
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
MIDR = "0x00000000413fd0c1\n"  # the same in one register


def system(scratch: Path) -> Path:
    """A folder with Debian's Python for aarch64; the system's own list of packages is not changed."""
    root, state = scratch / "root", scratch / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (state / folder).mkdir(parents=True)
    (state / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "0",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "1",
        "Dir::State::status": state / "status",
        "Dir::State::lists": state / "lists",
        "Dir::Cache": state,
    }
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in settings.items())]
    native.run(*apt, "update")
    native.run(*apt, "install", "-y", "--download-only", "python3", "libgomp1", "libstdc++6")
    for package in sorted((state / "archives").glob("*.deb")):
        native.run("dpkg", "-x", package, root)
    processors = range(os.cpu_count() or 1)
    for number in processors:
        folder = root / f"sys/devices/system/cpu/cpu{number}/regs/identification"
        folder.mkdir(parents=True)
        (folder / "midr_el1").write_text(MIDR, encoding="ascii")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cpuinfo").write_text("".join(map(CPUINFO.format, processors)), encoding="ascii")
    return root


def emulator(root: Path) -> list[str]:
    return ["qemu-aarch64", "-cpu", "neoverse-n1", "-L", str(root)]


def cross_build(sources: Path, version: str, suffix: str, scratch: Path) -> Path:
    """The unrepaired wheel, made by the x86-64 Python of this version for the other machine."""
    python = shutil.which(f"python{version}")
    if python is None:
        raise SystemExit(f"expected python{version}, the version of Debian's {MACHINE} Python, on the PATH")
    env = native.compiler_flags(scratch, COMPILER)
    env["_PYTHON_HOST_PLATFORM"] = f"linux-{MACHINE}"
    return native.build(sources, python, scratch, env, **TARGET, PYTHON_MODULE_EXTENSION=suffix)


def install(wheel: Path, version: str, site: Path, *more: str) -> None:
    """The wheel and what it requires, for the other machine."""
    platforms = [f"--platform=manylinux_2_{minor}_{MACHINE}" for minor in range(17, 29)]
    native.run(
        *(sys.executable, "-m", "pip", "install", "-q", "--target", site, "--python-version", version),
        *("--only-binary=:all:", "-c", native.CONSTRAINTS, f"--platform=manylinux2014_{MACHINE}"),
        *(*platforms, wheel, *more),
    )


def cpp_tests(sources: Path, root: Path, folder: Path) -> None:
    defines = {
        **TARGET,
        "CMAKE_CROSSCOMPILING_EMULATOR": ";".join(emulator(root)),
        "PAMA_BUILD_MODULE": "OFF",
        "PAMA_BUILD_TESTS": "ON",
    }
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in (
        ["cmake", "-G", "Ninja", "-S", sources, "-B", folder, *(f"-D{k}={v}" for k, v in defines.items())],
        ["cmake", "--build", folder],
        ["ctest", "--test-dir", folder, "--output-on-failure", "--no-tests=error", "-E", "fuzz"],
    ):
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=native.ROOT / "dist")
    parser.add_argument("--build-only", action="store_true", help="install and run nothing")
    parser.add_argument("--cpp", action="store_true", help="run the C++ tests first")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, default=[], metavar="PYTEST_ARGUMENT")
    options = parser.parse_args()
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise SystemExit(f"{', '.join(missing)} not found: Debian's g++-aarch64-linux-gnu and qemu-user")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        root, sources = system(scratch), native.unpacked(scratch)
        python = [*emulator(root), str(root / "usr/bin/python3")]
        query = "import sysconfig as s; print(s.get_python_version(), s.get_config_var('EXT_SUFFIX'))"
        version, suffix = native.run(*python, "-c", query).split()
        if options.cpp:
            cpp_tests(sources, root, scratch / "cpp")
        (tools := scratch / "tools").mkdir()
        (tools / "strip").symlink_to(shutil.which("aarch64-linux-gnu-strip"))
        wheel = native.repair(cross_build(sources, version, suffix, scratch), options.out, "auto", tools)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB", flush=True)
        if options.build_only:
            return
        site, run = scratch / "site", scratch / "run"
        install(wheel, version, site, *(("pytest", "pytest-timeout", "hypothesis") if options.tests else ()))
        run.mkdir()  # without the sources, which would be imported instead
        env = {**os.environ, "PYTHONPATH": str(site)}
        subprocess.run([*python, native.HERE / "smoke.py"], check=True, cwd=run, env=env)
        if options.tests:
            shutil.copytree(native.ROOT / "tests", run / "tests")
            shutil.copy2(native.ROOT / "pyproject.toml", run)
            subprocess.run([*python, "-m", "pytest", *options.tests], check=True, cwd=run, env=env)


if __name__ == "__main__":
    main()

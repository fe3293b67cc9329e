"""Makes the wheels that a GPU machine without a network needs: `python -m tests.gpu.wheels DIR` (make gpu-wheels).

For Python 3.12 on x86-64, next to a CUDA build of torch; versions are those of constraints.txt. DeepSpeed has no wheel
and is built, so this runs on Python 3.12. The largest are packed anew with LZMA, which pip reads like any zip file, Ray
without jars and dashboard. Ray comes last: it is left out if all would not fit, and the section `ray` is skipped.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 60_000_000
# What such a machine lacks, or may have too old; the most needed first.
CARRIED = (
    "deepspeed", "hjson", "pydantic", "pydantic_core", "annotated-types", "typing-inspection", "transformers",
    "tokenizers", "huggingface_hub", "peft", "rich", "zstandard", "datasets", "dill", "multiprocess", "trl", "ray",
)  # fmt: skip
_TRL = "1.16.0"  # compared with, not needed
_BUILT = "deepspeed"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_REPACKED = ("pydantic_core", "transformers", "tokenizers", "zstandard", "ray")
_NOT_NEEDED = re.compile(r"\.jar$|^ray/dashboard/client/|^ray/(rllib|serve|tune)/|^ray/cpp/")


def pinned(constraints: str) -> dict[str, str]:
    """Returns the version of each package in constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", constraints, re.MULTILINE))


def choose_wheels(sizes: Mapping[str, int], limit: int) -> tuple[list[str], list[str]]:
    """Returns the packages whose wheels fit, each taken in turn, and those that do not."""
    taken: list[str] = []
    for name, size in sizes.items():
        if sum(sizes[other] for other in taken) + size <= limit:
            taken.append(name)
    return taken, [name for name in sizes if name not in taken]


def make_wheel(name: str, version: str, directory: Path) -> Path:
    """Downloads a wheel, or builds it where there is none."""
    into = directory / name
    if name == _BUILT:
        command = ["wheel", "--no-build-isolation"]
    else:
        platforms = [argument for platform in _PLATFORMS for argument in ("--platform", platform)]
        command = ["download", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *platforms]
    where = "--wheel-dir" if name == _BUILT else "--dest"
    subprocess.run(
        [sys.executable, "-m", "pip", *command, "--quiet", "--no-deps", where, str(into), f"{name}=={version}"],
        check=True,
        env={**os.environ, "DS_BUILD_OPS": "0"},
    )
    (wheel,) = into.glob("*.whl")
    return repack(wheel) if name in _REPACKED else wheel


def repack(wheel: Path) -> Path:
    """Rewrites a wheel smaller, Ray's without what training does not use."""
    smaller = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as new:
        for entry in old.infolist():
            if not _NOT_NEEDED.search(entry.filename):
                new.writestr(entry, old.read(entry), zipfile.ZIP_LZMA)
    return smaller.replace(wheel)


def main() -> int:
    """Makes the wheels and says what was left out."""
    parser = argparse.ArgumentParser(prog="gpu-wheels", description=__doc__)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    if sys.version_info[:2] != (3, 12):
        print(f"DeepSpeed's wheel must be built by Python 3.12, not {sys.version.split()[0]}: set PYTHON312")
        return 2
    versions = {"trl": _TRL, **pinned((ROOT / "constraints.txt").read_text(encoding="utf-8"))}
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.whl"):
        old.unlink()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = {name: make_wheel(name, versions[name], Path(scratch)) for name in CARRIED}
        taken, _ = choose_wheels({name: wheel.stat().st_size for name, wheel in made.items()}, LIMIT_BYTES)
        for name, wheel in made.items():
            size = f"{wheel.stat().st_size / 1e6:5.1f} MB  {name}"
            print(size if name in taken else f"{size}: left out, {LIMIT_BYTES / 1e6:.0f} MB are the limit")
            if name in taken:
                wheel.rename(directory / wheel.name)
    print(f"{sum(file.stat().st_size for file in directory.glob('*.whl')) / 1e6:5.1f} MB in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

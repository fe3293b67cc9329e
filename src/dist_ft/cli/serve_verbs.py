"""`serve`: the inference API."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from dist_ft.errors import UsageError

_NEEDED = ("ray", "fastapi", "uvicorn", "sqlalchemy", "llguidance")


def serve(
    target: Annotated[
        str | None, typer.Argument(metavar="RUN|DIR", help="Run, or directory of a model or adapter.")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="Store of serve-api: all its models, by name.")] = None,
    engine: Annotated[str, typer.Option(help="auto or torch; vllm where it is installed.")] = "auto",
    host: Annotated[str, typer.Option(help="Other than loopback needs --store with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[str, typer.Option(help="A number, or auto.")] = "1",
    address: Annotated[str | None, typer.Option(help="Ray cluster to serve on; default starts one here.")] = None,
    catalogue: Annotated[Path | None, typer.Option(help="YAML of a store's base models.")] = None,
    database: Annotated[str | None, typer.Option(help="URL of a store's index.")] = None,
    leased: Annotated[bool, typer.Option("--leased", help="End when standard input ends.", hidden=True)] = False,
) -> None:
    """Serve models behind OpenAI's inference API: chat, completions, responses."""
    if (target is None) == (store is None):
        raise UsageError("serve needs a run or a directory, or --store STORE; give one of them")
    _check_engine(engine)
    _check_installed()
    from dist_ft.orchestrate.workers.ray_version import check_ray_version

    check_ray_version()
    from dist_ft.serving import ray_app, ray_here

    source = ray_app.Source(_absolute(target), store, database, catalogue)
    place = ray_app.Place(host, port, _number(replicas), address)
    with tempfile.TemporaryDirectory(prefix="dist-ft-serve-") as scratch:
        ray_app.check(source, place)
        ray_here.connect(address, Path(scratch))
        try:
            ray_app.start(source, place)
            typer.echo(f"serving {target or store} on http://{host}:{port}/v1 (Ctrl-C ends it)")
            _wait(leased)
        finally:
            ray_app.stop()


def _wait(is_leased: bool) -> None:
    """Wait for SIGINT or SIGTERM, or for the end of the process that started this one."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    if is_leased:
        threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    ended.wait()


def _absolute(target: str | None) -> str | None:
    return str(Path(target).absolute()) if target is not None and "://" not in target else target


def _check_engine(engine: str) -> None:
    if engine not in ("auto", "torch", "vllm"):
        raise UsageError(f"--engine {engine} is none of auto, torch, vllm")
    if engine == "vllm":
        why = "is not installed" if find_spec("vllm") is None else "is not driven by this version of dist-ft"
        raise UsageError(
            f"--engine vllm: vllm {why}; use --engine torch, or `dist-ft export RUN --merge --to DIR` and "
            "`vllm serve DIR` in an environment of its own"
        )


def _check_installed() -> None:
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UsageError(f"serve needs {', '.join(missing)}; pip install 'dist-ft[serving]'")


def _number(replicas: str) -> int | None:
    if replicas == "auto":
        return None
    if not replicas.isdigit() or int(replicas) < 1:
        raise UsageError(f"--replicas {replicas} is neither a number from 1 nor auto")
    return int(replicas)

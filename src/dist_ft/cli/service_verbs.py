"""`serve`, `serve-api` and `api key`: the inference API, the fine-tuning service, and its keys."""

from __future__ import annotations

import logging
import signal
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ft.cli.launcher_table import LAUNCHERS, LauncherOptions, complete_launcher, launcher_named
from dist_ft.cli.options import BatchScript, Dashboard, Image, Namespace, Overlay, SbatchOptions
from dist_ft.errors import UsageError
from dist_ft.service import DATABASE_ENV

if TYPE_CHECKING:
    from dist_ft.service.index import Index

_SERVING_NEEDS = ("ray", "fastapi", "uvicorn", "sqlalchemy", "llguidance")
StorePlace = Annotated[str, typer.Option("--store", help="Directory or URL of files, jobs and runs.")]
Database = Annotated[
    str | None,
    typer.Option(envvar=DATABASE_ENV, help="URL of the index, such as postgresql+psycopg://…; default SQLite."),
]


def serve_api(
    store: StorePlace = "service",
    database: Database = None,
    host: Annotated[str, typer.Option(help="Other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    launcher: Annotated[
        str, typer.Option(help=f"Where jobs run: {', '.join(LAUNCHERS)}.", autocompletion=complete_launcher)
    ] = "local",
    max_running: Annotated[int, typer.Option(min=1, help="Jobs at once; the others queue.")] = 2,
    max_active_jobs: Annotated[int, typer.Option(min=1, help="Jobs of a project that are not over.")] = 100,
    max_project_gb: Annotated[float, typer.Option(min=0, help="Gigabytes of files of a project.")] = 2500,
    max_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests of a project a minute; default as many as it likes.")
    ] = None,
    catalogue: Annotated[Path | None, typer.Option(help="YAML of base models; default: the embedded ones.")] = None,
    serving: Annotated[
        str, typer.Option(help="Who answers chats: auto starts dist-ft serve when asked, off, or the URL of one.")
    ] = "auto",
    serving_idle_s: Annotated[float, typer.Option(min=1, help="Seconds until an idle one ends.")] = 900,
    admin_key_file: Annotated[Path | None, typer.Option(help="File with a key that is an administrator's.")] = None,
    address: Dashboard = None,
    overlay: Overlay = None,
    namespace: Namespace = "dist-ft",
    image: Image = None,
    template: BatchScript = None,
    sbatch: SbatchOptions = None,
) -> None:
    """Serve OpenAI's API: files, fine-tuning jobs, models, and their answers."""
    launching = LauncherOptions(address, overlay, namespace, image, template, tuple(sbatch or ()))
    place = launcher_named(launcher, launching)
    _check_installed()
    from dist_ft.service.api_server import Settings, serve
    from dist_ft.service.inference import ServingChoice
    from dist_ft.service.tuning.dispatcher import Place

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for library in ("httpx", "botocore", "aiobotocore"):  # they have a line for every request, or every client
        logging.getLogger(library).setLevel(logging.WARNING)
    choice = ServingChoice(serving, serving_idle_s, database, catalogue)
    settings = Settings(
        store, database, catalogue, host, port, max_active_jobs, int(max_project_gb * 1e9), max_requests, choice,
        admin_key_file,
    )  # fmt: skip
    serve(settings, Place(place, max_running))


def serve(
    target: Annotated[
        str | None, typer.Argument(metavar="RUN|DIR", help="Run, or directory of a model or adapter.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Store of serve-api: all its models, by name.")] = None,
    engine: Annotated[str, typer.Option(help="auto or torch; vllm only says how to.")] = "auto",
    host: Annotated[str, typer.Option(help="Other than loopback needs --store with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[str, typer.Option(help="A number, or auto.")] = "1",
    address: Annotated[str | None, typer.Option(help="Ray cluster to serve on; default starts one here.")] = None,
    catalogue: Annotated[Path | None, typer.Option(help="YAML of a store's base models.")] = None,
    database: Database = None,
    leased: Annotated[bool, typer.Option("--leased", help="End when standard input ends.", hidden=True)] = False,
) -> None:
    """Serve models behind OpenAI's inference API: chat, completions, responses."""
    if (target is None) == (store is None):
        raise UsageError("serve needs a run or a directory, or --store STORE; give one of them")
    _check_engine(engine, target)
    _check_serving()
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

        def follow() -> None:
            sys.stdin.read()
            ended.set()

        threading.Thread(target=follow, daemon=True).start()
    ended.wait()


def add_key(
    store: StorePlace = "service",
    role: Annotated[str, typer.Option(help="admin or member.")] = "member",
    project: Annotated[str, typer.Option(help="Project whose files and jobs the key sees.")] = "default",
    name: Annotated[str, typer.Option(help="For whom it is.")] = "",
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires; default never.")] = None,
    database: Database = None,
) -> None:
    """Make a key; it is shown once, as the last word."""
    index = _open(store, database)
    from dist_ft.service import api_keys

    typer.echo(f"key of project {project}, role {role}: {api_keys.add_key(index, role, project, name, days)}")


def list_keys(store: StorePlace = "service", database: Database = None) -> None:
    """List the keys, without their secrets."""
    index = _open(store, database)
    from dist_ft.service import api_keys

    for key in api_keys.list_keys(index):
        expires = "never" if key.expires_at is None else str(key.expires_at)
        typer.echo(f"{key.id}  {key.shown}  project {key.project}  {key.role}  expires {expires}  {key.name}".rstrip())


def remove_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id, as `api key ls` shows it.")],
    store: StorePlace = "service",
    database: Database = None,
) -> None:
    """Remove a key; requests with it are refused from now on."""
    index = _open(store, database)
    from dist_ft.service import api_keys

    api_keys.remove_key(index, key)
    typer.echo(f"removed {key}")


def _open(store: str, database: str | None) -> Index:
    _check_installed()
    from dist_ft.service.api_server import Settings, open_index

    return open_index(Settings(store, database))


def _check_installed() -> None:
    if missing := [
        name for name in ("fastapi", "uvicorn", "sqlalchemy", "python_multipart", "httpx") if find_spec(name) is None
    ]:
        raise UsageError(f"the service needs {', '.join(missing)}; pip install 'dist-ft[service]'")


def _absolute(target: str | None) -> str | None:
    return str(Path(target).absolute()) if target is not None and "://" not in target else target


def _check_engine(engine: str, target: str | None) -> None:
    if engine not in ("auto", "torch", "vllm"):
        raise UsageError(f"--engine {engine} is none of auto, torch, vllm")
    if engine == "vllm":
        way = "`dist-ft export RUN --merge --to DIR` and `vllm serve DIR`" if target is None else _way_of_vllm(target)
        raise UsageError(
            "--engine vllm: this version of dist-ft does not drive vllm. Use --engine torch, or in an environment with "
            f"vllm: {way}"
        )


def _way_of_vllm(target: str) -> str:
    """Return how vLLM serves the result of a run, or a directory, from its files alone."""
    from dist_ft.engine.vllm_adapter import vllm_adapter
    from dist_ft.run.exports import FINAL
    from dist_ft.run.place import open_run

    path = Path(target)
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        run = open_run(target)
        export = run.pointed_at(FINAL)
        if export is None or run.is_remote:
            return f"`dist-ft export {target} --merge --to DIR` and `vllm serve DIR`"
        return vllm_adapter(Path(run.address_of(export)).resolve()).way(path.name)
    return vllm_adapter(path.absolute()).way(path.name)


def _check_serving() -> None:
    if missing := [name for name in _SERVING_NEEDS if find_spec(name) is None]:
        raise UsageError(f"serve needs {', '.join(missing)}; pip install 'dist-ft[serving]'")


def _number(replicas: str) -> int | None:
    if replicas == "auto":
        return None
    if not replicas.isdigit() or int(replicas) < 1:
        raise UsageError(f"--replicas {replicas} is neither a number from 1 nor auto")
    return int(replicas)

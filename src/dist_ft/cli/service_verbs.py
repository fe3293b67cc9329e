"""`serve-api` and `api key`: the fine-tuning service and its keys."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_ft.cli.launcher_table import LAUNCHERS, LauncherOptions, complete_launcher, launcher_named
from dist_ft.cli.options import Dashboard
from dist_ft.errors import UsageError

if TYPE_CHECKING:
    from dist_ft.service.index import Index

StoreDir = Annotated[Path, typer.Option("--store", help="Directory of files, jobs and runs.")]
Database = Annotated[str | None, typer.Option(help="URL of the index, such as postgresql+psycopg://…; default SQLite.")]


def serve_api(
    store: StoreDir = Path("service"),
    database: Database = None,
    host: Annotated[str, typer.Option(help="Other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    launcher: Annotated[
        str, typer.Option(help=f"Where jobs run: {', '.join(LAUNCHERS)}.", autocompletion=complete_launcher)
    ] = "local",
    max_running: Annotated[int, typer.Option(min=1, help="Jobs at once; the others queue.")] = 2,
    max_active_jobs: Annotated[int, typer.Option(min=1, help="Jobs of a project that are not over.")] = 100,
    catalogue: Annotated[Path | None, typer.Option(help="YAML of base models; default: the embedded ones.")] = None,
    serving: Annotated[
        str, typer.Option(help="Who answers chats: auto starts dist-ft serve when asked, off, or the URL of one.")
    ] = "auto",
    serving_idle_s: Annotated[float, typer.Option(min=1, help="Seconds until an idle one ends.")] = 900,
    address: Dashboard = None,
    overlay: Annotated[Path | None, typer.Option(help="Kubernetes: Kustomization directory.")] = None,
    namespace: Annotated[str, typer.Option(help="Kubernetes: where runs go.")] = "dist-ft",
    image: Annotated[str | None, typer.Option(help="Kubernetes: image in place of the overlay's.")] = None,
    template: Annotated[Path | None, typer.Option(help="Slurm: batch script.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="Slurm: option of sbatch.")] = None,
) -> None:
    """Serve OpenAI's API: files, fine-tuning jobs, models, and their answers."""
    launching = LauncherOptions(address, overlay, namespace, image, template, tuple(sbatch or ()))
    place = launcher_named(launcher, launching)
    _check_installed()
    from dist_ft.service.api_server import Settings, serve
    from dist_ft.service.inference import ServingChoice
    from dist_ft.service.tuning.dispatcher import Place

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    given = {"--database": database, "--catalogue": catalogue}
    options = tuple(word for name, value in given.items() if value is not None for word in (name, str(value)))
    choice = ServingChoice(serving, serving_idle_s, options)
    settings = Settings(store, database, catalogue, host, port, max_active_jobs, serving=choice)
    serve(settings, Place(place, max_running))


def add_key(
    store: StoreDir = Path("service"),
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


def list_keys(store: StoreDir = Path("service"), database: Database = None) -> None:
    """List the keys, without their secrets."""
    index = _open(store, database)
    from dist_ft.service import api_keys

    for key in api_keys.list_keys(index):
        expires = "never" if key.expires_at is None else str(key.expires_at)
        typer.echo(f"{key.id}  {key.shown}  project {key.project}  {key.role}  expires {expires}  {key.name}".rstrip())


def remove_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id, as `api key ls` shows it.")],
    store: StoreDir = Path("service"),
    database: Database = None,
) -> None:
    """Remove a key; requests with it are refused from now on."""
    index = _open(store, database)
    from dist_ft.service import api_keys

    api_keys.remove_key(index, key)
    typer.echo(f"removed {key}")


def _open(store: Path, database: str | None) -> Index:
    _check_installed()
    from dist_ft.service.api_server import Settings, open_index

    return open_index(Settings(store, database))


def _check_installed() -> None:
    from importlib.util import find_spec

    if missing := [
        name for name in ("fastapi", "uvicorn", "sqlalchemy", "python_multipart", "httpx") if find_spec(name) is None
    ]:
        raise UsageError(f"the service needs {', '.join(missing)}; pip install 'dist-ft[service]'")

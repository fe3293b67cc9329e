"""Builds the command from its verbs, and maps errors to exit codes.

Verbs import what they need when they are called, so that `dist-ft --help` and config errors are quick.
"""

from __future__ import annotations

import errno
import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from dist_ft import __version__
from dist_ft.cli import check_verbs, checkpoint_verbs, data_verbs, job_verbs, report_verbs, service_verbs
from dist_ft.cli.outputs import print_error
from dist_ft.errors import DistFtError
from dist_ft.machine import home_env

app = typer.Typer(
    name="dist-ft",
    help="Fine-tune language models on a Ray cluster whose machines come and go.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of dist-ft itself."""
    if version:
        typer.echo(f"dist-ft {__version__}")
        raise typer.Exit


for verb in (
    job_verbs.train, job_verbs.submit, check_verbs.plan, job_verbs.status, job_verbs.logs, job_verbs.stop,
    job_verbs.watch, checkpoint_verbs.export,
):  # fmt: skip
    app.command()(verb)
app.command("eval")(report_verbs.evaluate)
app.command()(report_verbs.report)
app.command()(report_verbs.compare)
app.command()(check_verbs.doctor)
app.command("import")(check_verbs.import_config)

checkpoint = typer.Typer(
    help="List, verify, tag and delete a run's checkpoints; import those of other tools.", no_args_is_help=True
)
app.add_typer(checkpoint, name="checkpoint")
checkpoint.command("ls")(checkpoint_verbs.list_checkpoints)
checkpoint.command("verify")(checkpoint_verbs.verify)
checkpoint.command("tag")(checkpoint_verbs.tag)
checkpoint.command("rm")(checkpoint_verbs.remove)
checkpoint.command("import")(checkpoint_verbs.import_checkpoint)

data = typer.Typer(help="Look at the data of a run before it costs anything.", no_args_is_help=True)
app.add_typer(data, name="data")
data.command("show")(data_verbs.show)
data.command("check")(data_verbs.check)
data.command("distill")(data_verbs.distill)
data.command("prepare")(data_verbs.prepare)

app.command()(service_verbs.serve)
app.command("serve-api")(service_verbs.serve_api)
api = typer.Typer(help="Administer the fine-tuning service.", no_args_is_help=True)
app.add_typer(api, name="api")
key = typer.Typer(help="Make, list and remove keys of the service.", no_args_is_help=True)
api.add_typer(key, name="key")
key.command("add")(service_verbs.add_key)
key.command("ls")(service_verbs.list_keys)
key.command("rm")(service_verbs.remove_key)


_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_ROOM = (
    "files go to run.output_dir, data.cache_dir, TMPDIR and the caches in HOME or XDG_CACHE_HOME; `dist-ft doctor` "
    "looks at them"
)


def main() -> None:
    """Run the command: print errors as one block, and exit with their code."""
    try:
        os.environ.update(home_env())  # before a library looks for it
        app()
    except DistFtError as error:
        print_error(str(error))
        sys.exit(error.exit_code)
    except ConnectionError as error:  # of the store that a run is in
        print_error(str(error))
        sys.exit(1)
    except OSError as error:
        if error.filename is not None and error.errno not in _REFUSALS:
            raise
        print_error(f"{error}; {_ROOM}")
        sys.exit(1)
    except ImportError:
        if find_spec("torch") is not None:
            raise
        # The client image (docker/client.txt).
        print_error(
            "this installation has no torch: it is a client, for submit, status, logs, stop and watch; the rest needs "
            "the image or environment of the cluster"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(1)

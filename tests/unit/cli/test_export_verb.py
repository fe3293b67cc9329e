"""What `dist-ft export` refuses before it reads anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_ft.cli.app import app
from dist_ft.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "megatron"], "--format megatron is not hf, gguf or universal"),
        (["--format", "universal", "--merge"], "leave out --merge, --dtype and --base-name"),
        (["--format", "universal", "--dtype", "bfloat16"], "leave out --merge, --dtype and --base-name"),
        (["--dtype", "float16"], "--dtype float16 is not float32 or bfloat16 (--format hf)"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--to", str(tmp_path / "out"), *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()

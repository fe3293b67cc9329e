"""Which addresses are URLs, what in them is hidden, and which are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.errors import ConfigError
from dist_ft.storage.urls import checked_store_url, is_url, redacted


@pytest.mark.parametrize("path", ["runs", "/abs/runs", "./a:b", "C:/runs", "a//b", "", "://x"])
def test_paths_are_no_urls(path: str) -> None:
    assert not is_url(path)
    assert redacted(path) == path


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("s3://user:pass@bucket/runs", "s3://***@bucket/runs"),
        ("s3://user:pa/ss@bucket/runs", "s3://***@bucket/runs"),
        ("https://host/a?X-Amz-Signature=1", "https://host/a?***"),
        ("https://host/a#token", "https://host/a?***"),
        ("abfs://container@account.dfs.core.windows.net/r", "abfs://container@account.dfs.core.windows.net/r"),
        ("abfs://container:key@account/r", "abfs://***@account/r"),
    ],
)
def test_what_may_be_secret_is_hidden(url: str, shown: str) -> None:
    assert redacted(url) == shown


@given(st.text(st.characters(codec="ascii", exclude_characters="@?#"), min_size=6).map(lambda s: f"{s}Zq9"))
def test_no_part_of_a_password_is_shown(password: str) -> None:
    assert "Zq9" not in redacted(f"s3://user:{password}@bucket/runs")
    with pytest.raises(ConfigError) as caught:
        checked_store_url(f"s3://user:{password}@bucket/runs")
    assert "Zq9" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket", "s3://my.bucket-1/a/b/", "gs://b/r", "az://c/r", "abfss://c@a.b.net/r"])
def test_folders_of_known_stores_are_taken(url: str) -> None:
    assert checked_store_url(url) == url.rstrip("/")

"""The run config: schema, loading, rules."""

from dist_ft.config.adapter_settings import with_adapter_settings
from dist_ft.config.load import (
    config_from_dict,
    dump_set_keys,
    dump_yaml,
    load_config,
    schema_json,
    with_absolute_paths,
    with_commit,
    with_model_dir,
)
from dist_ft.config.paths import check_config, check_config_elsewhere
from dist_ft.config.schema import Config

__all__ = [
    "Config",
    "check_config",
    "check_config_elsewhere",
    "config_from_dict",
    "dump_set_keys",
    "dump_yaml",
    "load_config",
    "schema_json",
    "with_absolute_paths",
    "with_adapter_settings",
    "with_commit",
    "with_model_dir",
]

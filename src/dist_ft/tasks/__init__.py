"""Bodies of Ray tasks: plain functions that join packages below. Each module has one `run(**json) -> json`."""

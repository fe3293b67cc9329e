"""Everything that knows DeepSpeed: its config, the engine, slices in and out."""

"""Everything that knows DeepSpeed: its config, the engine, trained state in and out, the optimizers."""

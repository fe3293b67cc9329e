"""The work of one rank: building, training loop, saving, schedule."""

"""What one rank does: wiring, loop, evaluation, schedule."""

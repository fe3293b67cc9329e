"""Where bytes lie: one protocol for directories and object stores."""

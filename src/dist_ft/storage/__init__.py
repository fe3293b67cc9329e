"""Stores bytes through one protocol for directories and object stores."""

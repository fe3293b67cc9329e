"""Shared doubles and drivers for tests."""

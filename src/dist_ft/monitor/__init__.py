"""Metric sinks and the console."""

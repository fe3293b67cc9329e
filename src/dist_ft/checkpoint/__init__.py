"""Manifests, lineage, slices on disk, consolidation."""

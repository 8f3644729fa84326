"""Volumes and masks: read, written, transformed, measured and pictured."""

"""Readers of what annotation tools write: each gives `OwnLabels`."""

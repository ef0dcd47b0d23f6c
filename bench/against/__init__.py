"""Compares this checkout with another revision. `revision` works without torch, so nothing is imported here."""

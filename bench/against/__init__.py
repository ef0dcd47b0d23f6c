"""This checkout against another revision. Nothing is imported here: `revision` has to do without torch."""

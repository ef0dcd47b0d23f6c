"""NPC in common training libraries: small programs that train a model in seconds, offline."""

"""NPC in the trainers that people use: small programs that train a real model in seconds, offline."""

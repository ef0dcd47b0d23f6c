"""NPC in common training libraries: programs that train a model in seconds, offline.

Run them from the checkout's folder, as in `python -m examples.accelerated`.
"""

"""Training in several processes: importance summed over processes, and parameters sharded over them."""

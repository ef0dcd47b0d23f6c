"""Training in several processes: importance that is added up over them, and parameters sharded over them."""

"""Weight gradients that are not computed, because the neurons they belong to are certain not to move."""

"""NPC and its relatives, as `torch.optim.Optimizer`s."""

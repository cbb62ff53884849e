"""Training: recipes, the loop, losses, optimisers, the folder of a run."""

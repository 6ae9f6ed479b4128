"""Linear controllers on features of a world model's belief, and their training by CMA-ES."""

"""What the commands beside ``run`` have in common: keys of their own, how they end, and runs they start."""

"""`DriftCallback` for other trainers, each in a module of its own: `transformers` and `lightning`."""

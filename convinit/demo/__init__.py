"""`convinit demo`: what initial weights do to a small Vision Transformer on real images."""

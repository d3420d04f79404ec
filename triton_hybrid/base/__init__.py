"""The base update rules: what a gradient step does."""

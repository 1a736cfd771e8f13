"""Commands of `ella-kd` that have a file of their own."""

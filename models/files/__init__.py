"""Files of models: by name from the hub, or from disk."""

"""Files of weights: what they are, their spellings, loading and saving; by name from the hub."""

"""What users add to a model: files that change its weights, its words, or what it sees."""

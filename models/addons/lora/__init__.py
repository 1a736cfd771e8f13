"""LoRA and its relatives: files of changes to weights."""

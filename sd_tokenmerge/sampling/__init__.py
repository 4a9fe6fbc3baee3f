"""Batch generation: classes, prompts, seeds, and run folders that survive anything."""

"""Batch generation: classes, prompts, seeds, and resumable run folders."""

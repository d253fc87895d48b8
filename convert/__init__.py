"""Hugging Face checkpoints in and out: reading, matching and (later) writing, without a device."""

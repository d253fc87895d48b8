"""What a model would need of a slice or a host, and how fast it could be at best."""

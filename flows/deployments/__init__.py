"""What deployments take from their callers."""

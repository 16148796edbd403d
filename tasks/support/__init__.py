"""What tasks share, and is none."""

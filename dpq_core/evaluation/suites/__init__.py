"""Suites of lm-evaluation-harness: found by name, loaded with their documents, named by content."""

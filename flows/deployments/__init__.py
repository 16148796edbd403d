"""Flows as they are deployed: a form, what its callers may set, the schedule."""

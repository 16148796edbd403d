"""What people read of a run: the report page, Prefect's artifacts, the ladder."""

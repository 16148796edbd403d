"""The `dpq` command."""

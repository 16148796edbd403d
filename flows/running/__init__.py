"""Where a flow's tasks run, and how a run that died is found."""

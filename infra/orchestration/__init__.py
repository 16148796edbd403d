"""Prefect: its server and MLflow's where nobody runs them, deployments, runs that died,
webhooks."""

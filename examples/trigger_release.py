"""Release from Python: PREFECT_API_URL=… python examples/trigger_release.py quickstart [KEY]"""

import sys

from infra.orchestration.client import launch, wait

recipe, *key = sys.argv[1:]
run = launch("release/release", {"recipe": recipe}, *key)
outcome = wait(run, timeout=3600)
print(outcome.verdict, *outcome.reasons, sep="\n  ")
sys.exit(outcome.exit_code)

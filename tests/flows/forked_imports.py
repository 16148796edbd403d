"""What a release imports, for `forked`: no thread is started, no device asked, nothing written."""

import os

from flows.cli.main import quiet_libraries
from infra.registry.tracking import _QUIET

quiet_libraries()
os.environ.update(_QUIET)

import datasets  # noqa: E402, F401
import mlflow.store.tracking.sqlalchemy_store  # noqa: E402, F401
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import flows.by_name  # noqa: E402
import flows.cli.forecast  # noqa: E402
import flows.cli.terminal  # noqa: E402
import flows.evaluate  # noqa: E402
import flows.quantize  # noqa: E402
import flows.release.release  # noqa: E402, F401
import tasks.support.figures  # noqa: E402, F401

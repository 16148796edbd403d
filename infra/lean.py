"""What a process of the pipeline need not import. Wherever they are installed, transformers imports
scikit-learn, and by it SciPy's statistics and pandas, for a threshold of assisted generation,
torchao for checkpoints in its format, and SciPy's optimizers for the losses of object detection:
2.0 s of processor time and 130 MB of every process, workers too. Here it is told that they are not
there, when it asks."""

import sys
from importlib.abc import MetaPathFinder

_ASKED = {  # module of transformers: the function by which it asks
    "transformers.generation.candidate_generator": "is_sklearn_available",
    "transformers.loss.loss_for_object_detection": "is_scipy_available",
    "transformers.quantizers.quantizer_torchao": "is_torchao_available",
}


class _Lean(MetaPathFinder):
    """Finds nothing; sees which module comes next."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if asked := _ASKED.get(fullname):
            setattr(sys.modules["transformers.utils"], asked, lambda *_: False)


def import_less() -> None:
    """From now on, in this process."""
    if not any(isinstance(finder, _Lean) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Lean())

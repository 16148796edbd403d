"""A native checkpoint behind MLflow's generic model, which generates text with it.

`mlflow.pyfunc.load_model("models:/NAME@champion")`, `mlflow models serve` and what else knows that
interface call `_load_pyfunc`. The linears are computed by the runtime of this device, and by the
definition where there is none: what is served is what was judged, to the order of sums.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dpq_core.checkpoint.native import load_quantized
from dpq_core.layer.linear import MakeLinear, W4A8Linear
from dpq_core.serving.runtimes import RuntimeUnavailableError, runtime_for

PARAMETERS: Mapping[str, int | float] = {"max_new_tokens": 64, "temperature": 0.0}  # defaults
# What this module needs, by the names that pip knows.
REQUIREMENTS = (
    "accelerate",
    "compressed-tensors",
    "llvmlite",
    "numba",
    "numpy",
    "pydantic",
    "pyyaml",
    "safetensors",
    "torch",
    "transformers",
)


class Generator:
    """Continues prompts with the model in `folder`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model = load_quantized(folder, device, linear=_linear(device))

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> list[str]:
        """What follows each prompt in the first column of a pandas DataFrame, without the prompt:
        greedy at temperature 0, sampled above.

        Raises:
            MlflowException: an empty prompt, no new tokens, a temperature below 0: who asks a
                server is told of no others.
        """
        asked = {**PARAMETERS, **(params or {})}
        most, temperature = int(asked["max_new_tokens"]), float(asked["temperature"])
        if most < 1 or temperature < 0:
            raise _refused(
                f"max_new_tokens is {most}, temperature {temperature:g}: at least 1, and at least 0"
            )
        how = {"do_sample": True, "temperature": temperature} if temperature else _GREEDY
        prompts = [str(each) for each in model_input.iloc[:, 0]]
        return [self._continued(each, {"max_new_tokens": most, **how}) for each in prompts]

    def _continued(self, prompt: str, how: Mapping[str, Any]) -> str:
        tokens = self._tokenizer(prompt, return_tensors="pt").to(self._model.device)
        given = tokens.input_ids.shape[1]
        if not given:
            raise _refused("an empty prompt: give at least one token to go on from")
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **how
            )
        text: str = self._tokenizer.decode(found[0, given:], skip_special_tokens=True)
        return text


# A model's own generation settings may sample; without these transformers warns of them.
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _refused(message: str) -> Exception:
    from mlflow.exceptions import MlflowException

    refused: Exception = MlflowException.invalid_parameter_value(message)
    return refused


def _linear(device: torch.device) -> MakeLinear:
    try:
        return runtime_for(device)
    except RuntimeUnavailableError:
        return W4A8Linear


def _load_pyfunc(path: str) -> Generator:
    """MLflow's entry, with the folder of the model version."""
    return Generator(Path(path))

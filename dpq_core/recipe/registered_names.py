"""Names of registered models: what MLflow takes, and what a model is called by default."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from dpq_core.digests import digest
from dpq_core.errors import InputError

_LONGEST_DEFAULT = 200  # characters, before what is appended
_LONGEST = 256  # characters: the column of MLflow's databases
# `/` and `:` MLflow refuses; the others end a name in an address (models:/NAME@champion, s3://…).
_NOT_IN_NAMES = re.compile(r"[/:@?#\x00-\x1f\x7f]")

# Parts of a path that any model's path may have.
_TELLS_NOTHING = re.compile(
    r"\W*"
    r"|models?|artifacts?|checkpoints?|snapshots?|outputs?|out|results?|runs?|exports?|exported|data"
    r"|final|best|last|latest|main|merged|weights|hf|pytorch|safetensors|mlruns|mlartifacts"
    r"|home|root|mnt|srv|opt|usr|var|tmp|work|workspace|content"
    r"|(checkpoint|ckpt|step|epoch|iter|global_?step|version|v|r|run)?[-_.]?\d+([-_.]\d+)*"
    r"|(m-)?(?=[0-9a-f-]*\d)[0-9a-f][0-9a-f-]{7,}",  # hashes, of MLflow and the hub
    re.IGNORECASE,
)
_HUB_CACHE = re.compile(r"models--(?:.+?--)?(.+)")


class RegisteredNameError(InputError):
    """A name that the registry would not take in the end."""


def checked_name(name: str) -> str:
    """A name that MLflow takes, in addresses and in its filters too.

    Raises:
        RegisteredNameError: another one, with what is wrong.
    """
    if not name.strip() or name in (".", ".."):
        raise RegisteredNameError(
            f"{name!r} is no name that MLflow takes: it needs a letter or digit"
        )
    if found := _NOT_IN_NAMES.search(name):
        raise RegisteredNameError(
            f"{name!r}: MLflow's names and addresses cannot hold {found[0]!r}"
        )
    if "'" in name and '"' in name:
        raise RegisteredNameError(f"{name!r}: MLflow's filters cannot hold both ' and \"")
    if len(name) > _LONGEST:
        raise RegisteredNameError(
            f"a name of {len(name)} characters: MLflow takes {_LONGEST} at most"
        )
    return name


RegisteredName = Annotated[str, AfterValidator(checked_name)]
ExperimentName = Annotated[str, Field(pattern=r"\S", max_length=500)]  # of MLflow's


def default_name(model_id: str) -> str:
    """What a model is called: the last part of its id that says something; of one without, by a
    digest of it. `…/llama-ft/artifacts/model` is `llama-ft`."""
    for part in reversed(model_id.split("/")):
        named = _HUB_CACHE.fullmatch(part)
        name = named[1] if named else part
        if not _TELLS_NOTHING.fullmatch(name) and not name.endswith(":"):
            return re.sub(r"[^\w.-]+", "-", name).strip("-.").lower()[:_LONGEST_DEFAULT]
    return f"model-{digest(model_id)[:8]}"

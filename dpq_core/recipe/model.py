"""`model`: the 16-bit checkpoint."""

from pydantic import Field

from dpq_core.recipe.section import Section


class ModelSection(Section):
    id: str = Field(min_length=1, description="hub id or folder of a safetensors checkpoint")
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub id; the manifest names the commit"
    )
    trust_remote_code: bool = Field(
        False, description="run the checkpoint's own Python code; the manifest says so"
    )

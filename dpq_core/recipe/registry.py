"""`registry`: under which name a release is registered, and where it is copied to."""

from pydantic import Field

from dpq_core.recipe.registered_names import ExperimentName, RegisteredName
from dpq_core.recipe.section import Section


class HubSection(Section):
    """A repository of a model hub; the token is in the environment, never here."""

    repo: str = Field(min_length=1, description="namespace/name on the hub")
    private: bool = Field(True, description="of a repository that is made, and asked of one there")
    branch: str = Field("main", pattern=r"^[\w][\w./-]*$", description="which a promotion moves")


class RegistrySection(Section):
    name: RegisteredName | None = Field(
        None, description="registered model; by default from the model's id"
    )
    any_base_model: bool = Field(
        False, description="take the alias from a champion that was made of another model"
    )
    experiment: ExperimentName = "dpq"
    destination: str | None = Field(
        None, pattern="^s3://[^/]+", description="s3://… where promoted releases are copied to"
    )
    hub: HubSection | None = Field(
        None, description="repository to which promoted releases are pushed"
    )

"""`execution`: where tasks run. It changes no number."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpq_core.recipe.section import Section


class ExecutionSection(Section):
    runner: Literal["threads", "processes", "dask"] = Field(
        "threads", description="what quantizes layers: dask may be on other machines"
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="tasks at a time on this machine, at most; none: two on a CPU, one a device",
    )
    shards: int | None = Field(
        None,
        ge=1,
        description="tasks that share the calibration samples; any number: the same bytes; none:"
        " one a worker of a CPU where a block takes seconds, else one",
    )
    blocks_per_task: int | None = Field(
        None,
        ge=1,
        description="blocks that a calibration task passes before it stores hidden states: more is"
        " less traffic, and more to repeat after a crash; none: by their size",
    )
    dask_address: str | None = Field(
        None,
        description="scheduler of a Dask cluster, tcp://host:port, whose workers see the same"
        " folders; none: `workers` processes on this machine",
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="what a layer's task takes of a Dask worker that declares it: {GPU: 1}",
    )
    threads_per_worker: int = Field(1, ge=1, description="of torch, for calibration and layers")
    store: str = Field(".dpq/store", description="folder of content-addressed artifacts")
    scratch: str | None = Field(
        None,
        description="folder for statistics and hidden states instead of the store: a fast disk that"
        " all workers have, those of one machine",
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:0, hpu")
    devices: Literal["auto"] | Annotated[int, Field(ge=1)] | list[str] = Field(
        "auto",
        description="accelerators that workers take, one each: all of them, [cuda:0, cuda:1] or"
        " so many; by name on every machine of a cluster",
    )

    @model_validator(mode="after")
    def _dask_alone(self) -> Self:
        for name in ("dask_address", "resources"):
            if getattr(self, name) and self.runner != "dask":
                raise ValueError(f"{name} needs runner: dask, and runner is {self.runner}")
        return self

    @model_validator(mode="after")
    def _blocks_are_not_shared(self) -> Self:
        if (self.shards or 1) > 1 and (self.blocks_per_task or 1) > 1:
            raise ValueError(
                f"shards is {self.shards} and blocks_per_task {self.blocks_per_task}: tasks share"
                " one block at a time: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _devices_are_several(self) -> Self:
        if isinstance(self.devices, list):
            twice = [name for name in self.devices if self.devices.count(name) > 1]
            if twice or not self.devices:
                why = f"names {twice[0]} twice" if twice else "is an empty list"
                raise ValueError(f"devices {why}: name each device that a worker takes once")
            if self.device != "auto":
                raise ValueError(
                    f"device is {self.device}, and devices names others: leave one of them out"
                )
        return self

"""Data sets that a recipe names, and how windows of tokens begin."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dpq_core.recipe.section import Section


class TextDataset(Section):
    """Arguments of `datasets.load_dataset`, and the column to read.

    `path: python_docs` is the corpus of `dpq_core.data.python_corpus` (splits train, validation).
    """

    path: str = Field(description="a hub id, a builder (json, text, parquet) or python_docs")
    name: str | None = Field(None, description="configuration of a hub data set")
    data_files: str | list[str] | None = None
    split: str = "train"
    text_column: str = "text"
    messages_column: str | None = Field(
        None,
        exclude_if=lambda column: column is None,  # a recipe is what it was before the field
        description="instead of a text, messages (role, content) as the chat template writes them",
    )
    revision: str | None = None

    @model_validator(mode="after")
    def _one_column(self) -> Self:
        default = type(self).model_fields["text_column"].default
        if self.messages_column is not None and self.text_column != default:
            raise ValueError(
                f"text_column is {self.text_column!r} and messages_column"
                f" {self.messages_column!r}: a document is one or the other: leave one out"
            )
        return self


class MixedDataset(TextDataset):
    """Another data set beside `calibration.dataset`."""

    share: float = Field(gt=0, lt=1, description="of the windows")


# See `dpq_core.data.texts.opening_token`.
Bos = Literal["auto", "always", "never"]
BOS_DESCRIPTION = (
    "each window begins with the begin-of-text token; auto: where the model was trained so"
)

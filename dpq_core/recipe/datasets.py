"""Data sets that a recipe names, and how windows of tokens begin."""

from typing import Literal

from pydantic import Field

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
    revision: str | None = None


# See `dpq_core.data.texts.opening_token`.
Bos = Literal["auto", "always", "never"]
BOS_DESCRIPTION = (
    "each window begins with the begin-of-text token; auto: where the model was trained so"
)

"""A recipe says everything about a run: its sections, the file that holds them, settings, names.

Without torch: commands that compute nothing read recipes too.
"""

from dpq_core.recipe.layer_choices import CHOICES, chosen_scheme
from dpq_core.recipe.recipe import (
    BenchmarkSection,
    CalibrationSection,
    DeviceKind,
    EvaluationSection,
    ExecutionSection,
    ExportName,
    GatesSection,
    ModelSection,
    PerplexitySection,
    Recipe,
    RecipeError,
    TextDataset,
    load_recipe,
    parse_recipe,
    read_recipe,
    validated,
)
from dpq_core.recipe.scheme import METHODS, PRESETS, Method, Scheme

__all__ = [
    "CHOICES",
    "METHODS",
    "PRESETS",
    "BenchmarkSection",
    "CalibrationSection",
    "DeviceKind",
    "EvaluationSection",
    "ExecutionSection",
    "ExportName",
    "GatesSection",
    "Method",
    "ModelSection",
    "PerplexitySection",
    "Recipe",
    "RecipeError",
    "Scheme",
    "TextDataset",
    "chosen_scheme",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "validated",
]

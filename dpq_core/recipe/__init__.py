"""A recipe says everything about a run: its sections, the file that holds them, settings, names.

Without torch: commands that compute nothing read recipes too.
"""

from dpq_core.recipe.attest import AttestLimits, AttestSection
from dpq_core.recipe.benchmark import BenchmarkSection, DeviceKind
from dpq_core.recipe.calibration import CalibrationSection
from dpq_core.recipe.datasets import TextDataset
from dpq_core.recipe.evaluation import EvaluationSection, PerplexitySection
from dpq_core.recipe.execution import ExecutionSection
from dpq_core.recipe.file import load_recipe, parse_recipe, read_recipe, validated
from dpq_core.recipe.gates import GatesSection
from dpq_core.recipe.layer_choices import CHOICES, chosen_scheme
from dpq_core.recipe.model import ModelSection
from dpq_core.recipe.recipe import ExportName, Recipe
from dpq_core.recipe.registry import RegistrySection
from dpq_core.recipe.repair import RepairSection
from dpq_core.recipe.scheme import METHODS, PRESETS, Method, Scheme
from dpq_core.recipe.text import RecipeError

__all__ = [
    "CHOICES",
    "METHODS",
    "PRESETS",
    "AttestLimits",
    "AttestSection",
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
    "RegistrySection",
    "RepairSection",
    "Scheme",
    "TextDataset",
    "chosen_scheme",
    "load_recipe",
    "parse_recipe",
    "read_recipe",
    "validated",
]

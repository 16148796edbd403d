"""The suites whose data a mirror can hold, a row each (`dpq_core.data.mirror`)."""

from dataclasses import dataclass

SUBJECTS = "mmlu/default"  # below lm_eval/tasks: a definition a subject


@dataclass(frozen=True)
class MirroredSuite:
    """One of the harness's suites, and its data.

    splits: official number of documents; the first is scored, the others give few-shot examples.
    """

    definition: str  # the harness's YAML, below lm_eval/tasks
    folder: str  # of the mirror
    hub: tuple[str, str | None]  # arguments of `datasets.load_dataset`
    splits: dict[str, int]
    fields: frozenset[str]  # that every document has

    @property
    def scored(self) -> str:
        return next(iter(self.splits))


def _row(
    definition: str, folder: str, hub: tuple[str, str | None], splits: dict[str, int], fields: str
) -> MirroredSuite:
    return MirroredSuite(definition, folder, hub, splits, frozenset(fields.split()))


MIRRORED = {
    "hellaswag": _row(
        "hellaswag/hellaswag.yaml",
        "hellaswag",
        ("Rowan/hellaswag", None),
        {"validation": 10_042, "train": 39_905},
        "activity_label ctx_a ctx_b endings label",
    ),
    "lambada_openai": _row(
        "lambada/lambada_openai.yaml",
        "lambada_openai",
        ("EleutherAI/lambada_openai", "default"),
        {"test": 5_153},
        "text",
    ),
    "boolq": _row(
        "super_glue/boolq/default.yaml",
        "boolq",
        ("aps/super_glue", "boolq"),
        {"validation": 3_270, "train": 9_427},
        "passage question label",
    ),
    "arc_easy": _row(
        "arc/arc_easy.yaml",
        "arc_easy",
        ("allenai/ai2_arc", "ARC-Easy"),
        {"test": 2_376, "validation": 570, "train": 2_251},
        "question choices answerKey",
    ),
    "piqa": _row(
        "piqa/piqa.yaml",
        "piqa",
        ("baber/piqa", None),
        {"validation": 1_838, "train": 16_113},
        "goal sol1 sol2 label",
    ),
    "winogrande": _row(
        "winogrande/default.yaml",
        "winogrande",
        ("allenai/winogrande", "winogrande_xl"),
        {"validation": 1_267, "train": 40_398},
        "sentence option1 option2 answer",
    ),
    "arc_challenge": _row(
        "arc/arc_challenge.yaml",
        "arc_challenge",
        ("allenai/ai2_arc", "ARC-Challenge"),
        {"test": 1_172, "validation": 299, "train": 1_119},
        "question choices answerKey",
    ),
    "openbookqa": _row(
        "openbookqa/openbookqa.yaml",
        "openbookqa",
        ("allenai/openbookqa", "main"),
        {"test": 500, "validation": 500, "train": 4_957},
        "question_stem choices answerKey",
    ),
    "mmlu": _row(
        SUBJECTS,
        "mmlu",
        ("cais/mmlu", "all"),
        {"test": 14_042, "dev": 285, "validation": 1_531},
        "question subject choices answer",
    ),
    "wikitext": _row(
        "wikitext/wikitext.yaml",
        "wikitext2_document_level_test",
        ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
        {"test": 62},
        "page",
    ),
}

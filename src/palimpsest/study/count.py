"""How many steps a study has, for its progress."""

from __future__ import annotations

from palimpsest.config import StudyConfig


def n_steps(config: StudyConfig) -> int:
    """Steps that `Study.run` reports, skipped ones too."""
    runs, n_tasks, options = config.runs, len(config.evaluation.tasks), config.evaluation
    models = config.models
    per_task_of_base = 1 + (models.asr is not None) + (models.adaptor is not None)  # text, cascade, speech
    shared = 6 + 4 + per_task_of_base * n_tasks  # models, data, features, analysis, maps, report; the base's own
    asked = sum(2 if method.modality == "speech" else 1 for method in runs.values()) + len(runs) * options.text_asr
    measured = sum(config.measures(run, "importance") + config.measures(run, "deactivation") for run in runs)
    probed = (1 + sum(config.measures(run, "probe") for run in runs)) * options.probe
    return shared + 2 * len(runs) + measured + probed + asked * n_tasks  # 2: checkpoint, perplexity

"""Tasks of lm-evaluation-harness, the package `lm_eval`, on the model of a run.

`lm_eval` makes requests of the tasks and scores of the answers; the model that answers is an engine. So it is
judged on the card that it was trained on, layer by layer and in its own number formats, without an export.

tasks   which tasks, their scores, and what can be wrong with them
model   the answers: log-probabilities and continuations

Not used of lm_eval: its models (so neither transformers nor accelerate is needed), its caches of answers, its
reports on the machine, and chat templates.
"""

from lowres.harness.tasks import SETTINGS, TEXTS, Scores, Tasks, load_tasks, score, score_in_training

__all__ = ["SETTINGS", "TEXTS", "Scores", "Tasks", "load_tasks", "score", "score_in_training"]

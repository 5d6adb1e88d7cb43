"""Labels of the models in pictures and tables of the report."""

LABELS = {
    "truth": "held-out truth",
    "teacher": "teacher",
    "untrained": "untrained hybrid",
    "student": "converted hybrid",
    "control": "control, gate at 0",
    "control_local": "control, local",
}
# The models that the recall test scores, in the order they are shown.
SCORED = ("teacher", "student", "control", "control_local")

"""Faces in photographs: found, brought to the place that the model was trained on, and judged. Needs no torch."""

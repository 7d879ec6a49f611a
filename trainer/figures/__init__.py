"""Pictures of what losses do: curves, boundaries, digits, captions."""

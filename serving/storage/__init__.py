"""The durable truth of a gallery: one SQLite file, its schema, its mark, and what is sealed in it."""

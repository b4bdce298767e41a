"""A real small model and a few problems, so that everything can be tried on a laptop."""

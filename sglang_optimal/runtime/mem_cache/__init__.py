"""The guest's slots, rows and radix cache."""

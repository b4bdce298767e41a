"""The student's slots, rows and radix cache."""

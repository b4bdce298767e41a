"""Which models can be one side."""

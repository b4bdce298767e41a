"""What a client's request says, and the ways in: HTTP, and the engine of a Python program."""

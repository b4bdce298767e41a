"""Everything that touches SGLang's inside, and nothing else does."""

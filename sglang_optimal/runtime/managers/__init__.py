"""The tokenizer manager, the scheduler and the workers, with a guest."""

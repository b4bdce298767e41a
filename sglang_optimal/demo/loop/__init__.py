"""The whole loop on a real small task: generate, filter, train, update the student live, evaluate."""

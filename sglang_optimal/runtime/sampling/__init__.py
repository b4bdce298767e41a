"""The mixing itself, as a sampler and an observer of sampling."""

"""The guest drafts, the mixture decides."""

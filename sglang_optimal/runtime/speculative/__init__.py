"""The student drafts, the mixture decides."""

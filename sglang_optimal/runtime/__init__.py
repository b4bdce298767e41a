"""What extends SGLang, in SGLang's own folders: its `X` is extended where SGLang has `X`.

docs/sglang.md is the index of all that is registered with SGLang, extends it, hooks it or is set on its objects: what,
why there is no other way, and what would make it go. `tests/test_intrusions.py` holds it against the code. What rides
on SGLang's requests and batches is declared in core.py.
"""

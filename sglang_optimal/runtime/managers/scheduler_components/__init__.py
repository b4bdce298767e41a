"""Parts of SGLang's scheduler."""

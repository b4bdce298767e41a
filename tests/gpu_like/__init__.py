"""The real engine with SGLang's GPU mechanisms switched on, on a CPU."""

"""The inference server: a small one that behaves like vLLM, and vLLM itself, built for CPUs."""

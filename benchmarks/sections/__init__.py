"""The parts of docs/benchmarks.md: one module per kind of result, each with a `section`."""

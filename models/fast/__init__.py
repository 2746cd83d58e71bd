"""The same numbers faster: docs/fast-execution.md says what, why, how it is checked, and how to ignore it."""

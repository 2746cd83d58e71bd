"""The same numbers faster: see README.md in this folder."""

"""What tells whether the result of a search can be trusted."""

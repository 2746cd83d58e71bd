"""What every command has: its errors in one line, and output that survives a closed terminal."""

"""What the text moves, and what it explains."""

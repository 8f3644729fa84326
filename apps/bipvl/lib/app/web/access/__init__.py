"""Who is let in, and what was set about it."""

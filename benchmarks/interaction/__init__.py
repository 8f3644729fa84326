"""Robot users: how much each click and scribble is worth."""

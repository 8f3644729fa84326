"""What the text had to do with a mask."""

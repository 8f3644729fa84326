"""Clicks and scribbles on plain arrays: what they say, how a mask follows them, and a robot that gives them."""

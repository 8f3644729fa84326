"""What clients send: checked, and brought into the values of its task."""

"""Generated CT-like studies."""

"""What a round or an evaluation found, as one HTML page, and pictures of versions."""

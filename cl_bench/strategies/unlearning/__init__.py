"""What makes a network forget on request."""

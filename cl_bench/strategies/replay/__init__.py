"""Old samples learned again beside new ones."""

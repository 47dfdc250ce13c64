"""What others are held against."""

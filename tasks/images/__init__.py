"""What the image streams share: finding, decoding, caching and arranging images."""

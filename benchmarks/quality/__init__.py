"""What cache policies cost in quality."""

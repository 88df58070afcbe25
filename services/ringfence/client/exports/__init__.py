"""What `audit export` writes: the trail in the format that somebody needs, a page at a time."""

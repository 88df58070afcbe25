"""What every part stands on and that has no word of the domain in it."""
